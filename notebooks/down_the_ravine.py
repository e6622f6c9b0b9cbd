# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Down the ravine
#
# The loss surface of a neural network is mostly *ravine*: steep in a few directions, shallow in many. A step long enough to make progress along the floor is far too long for the walls. Every optimizer in this lesson is an answer to that one difficulty, and each adds something to the recurrence before it:
#
# | section | adds | to fix |
# |---|---|---|
# | 1. gradient descent | | |
# | 2. heavy ball, Nesterov | a velocity | the crawl along the floor |
# | 3. AdaGrad, RMSProp | a rate for each coordinate | walls and floor wanting different rates |
# | 4. Adam | both, corrected for their start | first steps of the wrong size |
# | 5. AdamW | weight decay outside the ratio | a penalty that the ratio distorts |
# | 6. Lion | the sign alone | two buffers where one would do |
#
# Then all eight walk down four surfaces (the ravine along the axes, the same ravine turned, Rosenbrock's curved one, a saddle), first at sixty-one learning rates each, then at a good one.
#
# An optimizer here is an `optax.GradientTransformation`, a pair of functions: `init(params)` gives a state, `update(grads, state, params)` gives updates and the next state. Being pure, it runs inside `jax.lax.scan`, so a whole descent is one compiled loop:

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine.training.colours import PICTURES, colour


def descend(loss, tx, start, steps):
    """The points visited, [steps + 1, 2], and the state of `tx` after each step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    _, (path, states) = jax.lax.scan(step, (start, tx.init(start)), length=steps)
    return jnp.concatenate([start[None], path]), states


@partial(jax.jit, static_argnums=0)
def losses(loss, points):
    """The loss at each of the points, [..., 2]."""
    return jnp.apply_along_axis(loss, -1, points)


# %% [markdown]
# The rest of the set-up draws: contours of a surface, evenly spaced in the logarithm of the loss, and a path over them.

# %%
plt.rcParams.update(PICTURES | {"axes.titlesize": "medium", "axes.titlelocation": "left"})
COLORS = {
    name: colour(name.lower()) for name in ("SGD", "AdaGrad", "RMSProp", "Adam", "AdamW", "Lion")
}
COLORS |= {"heavy ball": "#4477AA", "Nesterov": "#44AA99"}


def draw_surface(ax, loss, xs, ys, minima=(), levels=12):
    """Contours of `loss` over the intervals `xs` and `ys`, stars on the minima."""
    x, y = np.meshgrid(np.linspace(*xs, 301), np.linspace(*ys, 201))
    z = losses(loss, jnp.stack([x, y], axis=-1))
    ax.contour(x, y, z, np.logspace(-2, 3.5, levels), colors="#c3c8cf", linewidths=0.6, zorder=0)
    for point in minima:
        ax.plot(*point, "*", color="#222222", markersize=11, zorder=5)
    ax.set(xlim=xs, ylim=ys, xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")


def draw_path(ax, path, color, label=None, **style):
    """A path: a ring at its start, a dot at each step."""
    style = {"linewidth": 1.2, "markersize": 3.5, **style}
    path = np.asarray(path)
    ax.plot(*path.T, ".-", color=color, label=label, **style)
    ax.plot(*path[0], "o", color=color, markerfacecolor="white", markersize=6)


# %% [markdown]
# ## 1. The ravine
#
# Take a quadratic valley, a hundred times as curved across as along, with its lowest point $\theta^\star$ **away from the origin** (weight decay pulls towards the origin, and would otherwise be helped by luck):
#
# $$f(\theta) = \tfrac12 \Big( h_1 (\theta_1 - \theta_1^\star)^2 + h_2 (\theta_2 - \theta_2^\star)^2 \Big), \qquad h = (1, 100), \qquad \kappa = \frac{h_2}{h_1} = 100.$$
#
# Gradient descent (SGD, here without the noise of minibatches) has one term and one number, the learning rate $\eta$:
#
# $$\theta_t = \theta_{t-1} - \eta\, g_t, \qquad g_t = \nabla f(\theta_{t-1}).$$
#
# On a quadratic it can be solved by hand. The distance to the minimum is multiplied by a constant at each step, another one for each curvature:
#
# $$\theta_{t,i} - \theta_i^\star = (1 - \eta h_i)^t \,(\theta_{0,i} - \theta_i^\star).$$
#
# So the wall sets the limit, $|1 - \eta h_2| < 1$ or $\eta < 2/h_2 = 0.02$, and the floor is then left with a factor $1 - \eta h_1$ above 0.98, whatever we do. The best compromise makes both factors equal in size: $\eta = 2/(h_1 + h_2)$, with
#
# $$\rho_{\text{SGD}} = \frac{\kappa - 1}{\kappa + 1} = \frac{99}{101},$$
#
# 115 steps for each factor of ten in distance. The condition number $\kappa$ is the price.

# %% mystnb={"image": {"alt": "Three paths of SGD on contours of a ravine. With a small rate it goes straight down the wall and hardly moves along the floor; with 0.018 it zigzags and crawls; with 0.0201 the zigzags grow and leave the picture."}}
CURVATURE = jnp.array([1.0, 100.0])
LOWEST = jnp.array([1.0, 0.5])
START = LOWEST + jnp.array([-4.1, 0.65])


def valley(params):
    """The ravine along the axes."""
    return 0.5 * jnp.sum(CURVATURE * (params - LOWEST) ** 2)


def draw_strips(paths, xs=(-3.5, 2.0)):
    """The ravine, once for each title, with a path in the color of an optimizer."""
    size = (8, (0.5 + 7.5 * 1.8 / (xs[1] - xs[0])) * len(paths))
    _, axes = plt.subplots(len(paths), 1, figsize=size, sharex=True, squeeze=False)
    for ax, (title, (name, path)) in zip(axes.flat, paths.items(), strict=True):
        draw_surface(ax, valley, xs, (-0.4, 1.4), [LOWEST])
        draw_path(ax, path, COLORS[name])
        ax.set(aspect="equal", title=title)
        ax.label_outer()
    return axes.flat


paths = {}
for rate, remark in [
    (0.002, "down the wall at once, the floor hardly begun"),
    (0.018, "zigzag, then a crawl"),
    (0.0201, "thrown out by the walls (it leaves the picture)"),
]:
    path, _ = descend(valley, ravine.sgd(rate), START, 60)
    by_hand = (1 - rate * CURVATURE) ** jnp.arange(61)[:, None] * (START - LOWEST) + LOWEST
    np.testing.assert_allclose(path, by_hand, atol=1e-4)
    paths[rf"SGD, $\eta$ = {rate}, 60 steps: {remark}"] = ("SGD", path)

draw_strips(paths)
plt.show()

# %% [markdown]
# The ring is the start, the star the minimum, each dot a step; both axes have the same scale. The cell also checked each path against the formula. At $\eta = 0.0201$, half a percent above the limit, each step multiplies the distance across by $-1.01$, and all the while the coordinate along the floor converges.
#
# ## 2. A velocity: heavy ball and Nesterov
#
# Across the ravine the gradient changes sign at every swing; along it, it always points the same way. Adding up past gradients cancels the one and accumulates the other:
#
# $$m_t = \mu\, m_{t-1} + g_t, \qquad \theta_t = \theta_{t-1} - \eta\, m_t. \qquad\text{(heavy ball)}$$
#
# Under a steady gradient $m$ grows to $g / (1 - \mu)$: at $\mu = 0.9$, ten times the step for the same $\eta$. Nesterov takes the gradient where the velocity is about to carry the parameters. Written in terms of the points where gradients are taken, that is one more term in the update,
#
# $$\theta_t = \theta_{t-1} - \eta\,(g_t + \mu\, m_t). \qquad\text{(Nesterov)}$$
#
# For a curvature $h$ each is a two-term recurrence, and the larger root of its characteristic polynomial is the factor $\rho$ by which the distance shrinks in the long run:
#
# $$\text{heavy ball: } \lambda^2 - (1 + \mu - \eta h) \lambda + \mu = 0, \qquad \text{Nesterov: } \lambda^2 - (1 + \mu)(1 - \eta h) \lambda + \mu (1 - \eta h) = 0.$$
#
# Where the roots are complex, the heavy ball has $|\lambda| = \sqrt{\mu}$ *whatever the curvature*. Wall and floor shrink alike, which is the gain; the wall rings for as long as the floor lasts, which is the cost. Nesterov has $|\lambda| = \sqrt{\mu (1 - \eta h)}$: the steeper, the stronger the damping.

# %% mystnb={"image": {"alt": "Two paths along the ravine. The heavy ball swings from wall to wall and past the minimum; Nesterov's path settles on the floor after two steps and follows it to the minimum."}}
ball, _ = descend(valley, ravine.sgd(0.01, momentum=0.9), START, 150)
nesterov, _ = descend(valley, ravine.sgd(0.01, momentum=0.9, nesterov=True), START, 150)
draw_strips(
    {
        r"heavy ball, $\eta$ = 0.01, $\mu$ = 0.9, 60 steps": ("heavy ball", ball[:61]),
        r"Nesterov, $\eta$ = 0.01, $\mu$ = 0.9, 60 steps": ("Nesterov", nesterov[:61]),
    }
)
plt.show()

# %% [markdown]
# Same learning rate, same momentum. The heavy ball swings from wall to wall; Nesterov, whose roots on this wall are both zero ($\eta h_2 = 1$), is on the floor after two steps and stays there. Both overshoot the minimum and come back: that is the velocity too.
#
# Choosing $\eta$ and $\mu$ best for the heavy ball (Polyak, 1964) puts $\sqrt\kappa$ where $\kappa$ was,
#
# $$\eta = \frac{4}{(\sqrt{h_1} + \sqrt{h_2})^2}, \qquad \mu = \Big( \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1} \Big)^2, \qquad \rho = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1} = \frac{9}{11},$$
#
# 11.5 steps for each factor of ten instead of 115.

# %% mystnb={"image": {"alt": "Loss against steps on a logarithmic scale: a shallow straight line for SGD at its best rate, steeper and wavy ones for heavy ball and Nesterov, and the steepest for the heavy ball at its best rate and momentum."}}
best_sgd, _ = descend(valley, ravine.sgd(2 / 101), START, 150)
best_ball, _ = descend(valley, ravine.sgd(4 / 121, momentum=81 / 121), START, 150)

fig, ax = plt.subplots(figsize=(8.5, 3.7))
for label, path, name, dash, factor in [
    (r"SGD, best $\eta$ = 2/101", best_sgd, "SGD", "-", 99 / 101),
    (r"heavy ball, $\eta$ = 0.01, $\mu$ = 0.9", ball, "heavy ball", "-", 0.9**0.5),
    (r"Nesterov, $\eta$ = 0.01, $\mu$ = 0.9", nesterov, "Nesterov", "-", (0.9 * 0.99) ** 0.5),
    (r"heavy ball, best $\eta$ and $\mu$", best_ball, "heavy ball", "--", 9 / 11),
]:
    label = rf"{label}: $\rho$ = {factor:.3f}"
    ax.semilogy(losses(valley, path), dash, color=COLORS[name], label=label)
ax.set(xlabel="step $t$", ylabel=r"loss $f(\theta_t)$", ylim=(1e-11, 1e3), xlim=(0, 150))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# In the long run the loss falls by $\rho^2$ per step: the formula gives the slope of each line. The best heavy ball is by far the steepest, but climbs for its first few steps, to ten times the loss it started from. And it has to know $h_1$ and $h_2$, which nobody does; in practice $\mu = 0.9$ and a searched $\eta$ are what remains.
#
# ## 3. A rate for each coordinate: AdaGrad and RMSProp
#
# The other way out: if wall and floor want different rates, give them different rates, measured from the gradients themselves. AdaGrad divides each coordinate by the root of the sum of its squared gradients,
#
# $$a_t = a_{t-1} + g_t^2, \qquad \theta_t = \theta_{t-1} - \frac{\eta}{\sqrt{a_t} + \epsilon}\, g_t,$$
#
# everything element by element. The scale of a coordinate cancels: multiply all its gradients by 100, and the updates stay the same. $\epsilon$ only keeps a coordinate whose gradients have all been zero from dividing by zero. The sum never shrinks, so under gradients that do not die out the rate falls like $1/\sqrt t$: a schedule, built in. RMSProp forgets instead,
#
# $$v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, \qquad \theta_t = \theta_{t-1} - \frac{\eta}{\sqrt{v_t} + \epsilon}\, g_t,$$
#
# with a memory of about $1/(1 - \beta_2)$ steps, here 100, and its rates can rise again.

# %% mystnb={"image": {"alt": "Paths of AdaGrad and RMSProp on the ravine: both go diagonally to the floor within a few steps and follow it to the minimum."}}
adagrad, adagrad_states = descend(valley, ravine.adagrad(0.5), START, 150)
rmsprop, rmsprop_states = descend(valley, ravine.rmsprop(0.05), START, 150)
draw_strips(
    {
        r"AdaGrad, $\eta$ = 0.5, 60 steps": ("AdaGrad", adagrad[:61]),
        r"RMSProp, $\eta$ = 0.05, 60 steps": ("RMSProp", rmsprop[:61]),
    }
)
plt.show()

# %% [markdown]
# No zigzag, and most of the floor is behind them after 60 steps. Both set off at 45°, $\theta_1$ and $\theta_2$ moving by the same 0.5: after one gradient, AdaGrad's root *is* $|g_1|$, and the step is $\eta\, \operatorname{sign}(g_1)$. RMSProp, at a tenth of the learning rate, makes the same first step, because its $v$ starts at zero: $\sqrt{v_1} = \sqrt{1 - \beta_2}\,|g_1| = 0.1\,|g_1|$. Nobody asked for a first step of $10\,\eta$; section 4 fixes it.
#
# What they have measured can be read from the state:

# %% mystnb={"image": {"alt": "The rate of each coordinate against steps. AdaGrad's falls for the shallow coordinate and stays low for the steep one; RMSProp's rises again in both as gradients shrink."}}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), sharey=True)
for ax, name, states, rate, moment in [
    (axes[0], "AdaGrad", adagrad_states, 0.5, "a_t"),
    (axes[1], "RMSProp", rmsprop_states, 0.05, "v_t"),
]:
    rates = rate / np.sqrt(optax.tree.get(states, "nu"))  # [steps, 2]
    for i, dash in enumerate(["-", "--"]):
        label = rf"$\theta_{i + 1}$, curvature {CURVATURE[i]:.0f}"
        ax.semilogy(np.arange(1, 151), rates[:, i], dash, color=COLORS[name], label=label)
    ax.set(title=rf"{name}: $\eta / \sqrt{{{moment}}}$", xlabel="step $t$", xlim=(0, 150))
    ax.legend(loc=(0.5, 0.4))
axes[0].set_ylabel("rate of a coordinate")
plt.show()
print(f"RMSProp's rates after the last step, floor over wall: {rates[-1, 0] / rates[-1, 1]:.1f}")

# %% [markdown]
# The floor gets the higher rate, about six times that of the wall: less than the hundred of a perfect preconditioner, but enough to end the zigzag. On this surface gradients die out exponentially, so AdaGrad's sums converge and its rates settle. RMSProp's rise, by at most $1/\sqrt{\beta_2}$ or half a percent per step, as it forgets the early gradients.
#
# ### What a diagonal cannot see
#
# The valley lies along the axes, which is the one case where a rate for each coordinate is exactly the right thing. Turn it by 45°, and both coordinates see the same mixture of wall and floor:

# %% mystnb={"image": {"alt": "Loss against steps for SGD, heavy ball, AdaGrad and RMSProp. Along the axes AdaGrad and RMSProp are as fast as the heavy ball or faster; in the turned ravine both are as slow as SGD, and SGD and heavy ball are unchanged."}}
ROTATION = jnp.array([[1.0, 1.0], [-1.0, 1.0]]) / jnp.sqrt(2.0)


def turned(params):
    """The same ravine, turned by 45 degrees about its minimum."""
    return valley(LOWEST + ROTATION @ (params - LOWEST))


TURNED_START = LOWEST + ROTATION.T @ (START - LOWEST)

fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.7), sharey=True)
for ax, loss, start, title in [
    (axes[0], valley, START, "along the axes"),
    (axes[1], turned, TURNED_START, "turned by 45°"),
]:
    for name, tx in {
        "SGD": ravine.sgd(2 / 101),
        "heavy ball": ravine.sgd(0.01, momentum=0.9),
        "AdaGrad": ravine.adagrad(0.5),
        "RMSProp": ravine.rmsprop(0.05),
    }.items():
        path, _ = descend(loss, tx, start, 150)
        ax.semilogy(losses(loss, path), color=COLORS[name], label=name)
    ax.set(title=title, xlabel="step $t$", ylim=(1e-9, 1e2), xlim=(0, 150))
axes[0].set_ylabel(r"loss $f(\theta_t)$")
axes[0].legend(loc="lower left")
plt.show()


# %% [markdown]
# Gradient descent and momentum are linear in the gradient: turned surface, turned path, same losses. AdaGrad and RMSProp are not, and fall back to the pace of gradient descent. (Methods that keep a matrix for each weight matrix, such as Shampoo, exist to see the turned ravine.)
#
# ## 4. Adam: both, corrected for their start
#
# Adam takes a running mean of the gradients for the direction, and one of their squares for the scale:
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2.$$
#
# Both start at zero, so both are too small at first. Unrolled, $m_t = (1 - \beta_1) \sum_{s=1}^{t} \beta_1^{t-s} g_s$: the weights add up to $1 - \beta_1^t$ and not to one. Dividing by what they add up to makes each a true weighted mean,
#
# $$\hat m_t = \frac{m_t}{1 - \beta_1^t}, \qquad \hat v_t = \frac{v_t}{1 - \beta_2^t}, \qquad \theta_t = \theta_{t-1} - \eta\, \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}.$$
#
# The same by expectation, as the paper has it. Take the mean over the noise of the gradients on both sides of $v_t = (1 - \beta_2) \sum_{s=1}^{t} \beta_2^{t-s} g_s^2$, and put $\mathbb{E}[g_t^2]$, that of the *present* gradient, in front of the sum:
#
# $$\mathbb{E}[v_t] = (1 - \beta_2) \sum_{s=1}^{t} \beta_2^{t-s}\, \mathbb{E}[g_s^2] = \mathbb{E}[g_t^2]\,(1 - \beta_2^t) + \zeta, \qquad \zeta = (1 - \beta_2) \sum_{s=1}^{t} \beta_2^{t-s} \big( \mathbb{E}[g_s^2] - \mathbb{E}[g_t^2] \big).$$
#
# If the second moment of the gradients stays the same, $\zeta = 0$, and $\hat v_t$ is unbiased. If it changes, $\zeta$ is what the memory of other times adds. It is small as long as gradients change little within the $1/(1 - \beta_2)$ steps that have a weight, and no division can take it away. Twenty thousand runs of pure noise, whose size stays the same, or halves every 100 steps:

# %%
B2, RUNS = 0.99, 20_000


def second_moments(sizes):
    """The mean of v over runs at each step, for gradients that are noise of these sizes."""
    tx = ravine.scale_by_adam(b1=0.0, b2=B2)

    def step(state, pair):
        key, size = pair
        _, state = tx.update(size * jax.random.normal(key, (RUNS,)), state)
        return state, jnp.mean(state.nu)

    keys = jax.random.split(jax.random.key(0), len(sizes))
    return jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(RUNS)), (keys, sizes))[1])()


t = np.arange(1, 301)
print("   t   1 - b2^t   E[v] / E[g^2], steady   falling   of it zeta")
steady = np.asarray(second_moments(jnp.ones(300)))
fading = 0.5 ** (t / 100)
falling = np.asarray(second_moments(jnp.asarray(fading, jnp.float32))) / fading**2
for n in (1, 10, 100, 300):
    weight = 1 - B2**n
    zeta = (1 - B2) * np.sum(B2 ** (n - t[:n]) * (fading[:n] ** 2 / fading[n - 1] ** 2 - 1))
    print(f"{n:4} {weight:10.3f} {steady[n - 1]:23.3f} {falling[n - 1]:9.3f} {zeta:12.3f}")

# %% [markdown]
# The steady column is $1 - \beta_2^t$; the falling one is larger by $\zeta$, since $v$ still remembers larger gradients, and steps are too short by the square root of that. Language models' gradients fall over a run too, which is one reason for $\beta_2 = 0.95$ instead of 0.999.
#
# Without the corrections, the two shortfalls do not cancel in the ratio. Under a steady gradient the corrected step is $\eta$; the uncorrected one is $\eta$ times
#
# $$\frac{1 - \beta_1^t}{\sqrt{1 - \beta_2^t}}.$$
#
# The state of `scale_by_adam` holds the raw moments, so Adam without its corrections is a small transformation around it:


# %% mystnb={"image": {"alt": "Left, both moments of a constant gradient: without correction they rise from near zero, the second a hundred times more slowly; corrected, they are one throughout. Right, the step without corrections rises to six times the rate and comes back; with corrections it is one throughout."}}
def scale_by_adam_uncorrected(**kwargs):
    """The ratio of Adam's raw moments."""
    inner = ravine.scale_by_adam(**kwargs)

    def update(grads, state, params=None):
        _, state = inner.update(grads, state, params)
        ratio = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), state.mu, state.nu)
        return ratio, state

    return optax.GradientTransformation(inner.init, update)


def steady(tx, steps):
    """Updates and states of `tx` under a gradient that is always one."""

    def step(state, _):
        update, state = tx.update(jnp.ones(()), state)
        return state, (update, state)

    return jax.lax.scan(step, tx.init(jnp.zeros(())), length=steps)[1]


t = np.arange(1, 3001)
corrected, states = steady(ravine.scale_by_adam(), len(t))
raw, _ = steady(scale_by_adam_uncorrected(), len(t))
np.testing.assert_allclose(raw, (1 - 0.9**t) / np.sqrt(1 - 0.999**t), rtol=1e-4)

fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), sharex=True)
axes[0].semilogx(t, states.mu, color=COLORS["Adam"], label="$m_t$")
axes[0].semilogx(t, states.nu, "--", color=COLORS["Adam"], label="$v_t$")
axes[0].axhline(1, color="#222222", linewidth=0.8, label=r"$\hat m_t$, $\hat v_t$")
axes[0].set(xlabel="step $t$", ylabel="moments of a gradient that is always 1", ylim=(0, 1.1))
axes[0].legend(loc=(0.43, 0.42), handlelength=1.5)
axes[1].semilogx(t, raw, "--", color=COLORS["Adam"], label="without corrections")
axes[1].semilogx(t, corrected, color=COLORS["Adam"], label="with corrections")
axes[1].set(xlabel="step $t$", ylabel=r"step, in units of $\eta$", ylim=(0, 7))
axes[1].legend(loc="upper right")
plt.show()
print(f"largest step without corrections: {raw.max():.2f} η, at step {raw.argmax() + 1}")


# %% [markdown]
# For Adam's $\beta = (0.9, 0.999)$ the numerator is complete after some fifty steps, the denominator only after thousands; in between, the uncorrected step is up to six and a half times too long. On the ravine, with the first five steps in orange:


# %% mystnb={"image": {"alt": "Two paths of Adam. With bias corrections it goes smoothly to the minimum; without them the first steps are too long, and it overshoots and circles back."}}
def uncorrected(learning_rate):
    """Adam without its bias corrections."""
    return optax.chain(scale_by_adam_uncorrected(), ravine.scale_by_learning_rate(learning_rate))


adam, _ = descend(valley, ravine.adam(0.1), START, 300)
loose, _ = descend(valley, uncorrected(0.1), START, 60)
axes = draw_strips(
    {
        r"Adam, $\eta$ = 0.1, 60 steps": ("Adam", adam[:61]),
        r"Adam without bias corrections, $\eta$ = 0.1, 60 steps": ("Adam", loose),
    },
    xs=(-3.5, 3.5),
)
for ax, path in zip(axes, [adam, loose], strict=True):
    draw_path(ax, path[:6], "#D55E00")
plt.show()

# %% [markdown]
# Corrected, Adam sets off like AdaGrad, with the sign of the gradient, and then each step is close to $\eta$ for as long as the gradients keep their sign and size: here five steps of 0.1 in each coordinate. Uncorrected, its first five carry $\theta_1$ more than four times as far, and it flies past the minimum.
#
# ## 5. Weight decay: beside the ratio, not inside it
#
# For gradient descent, shrinking the weights by a factor $1 - \eta\lambda$ at each step and adding the penalty $\frac{\lambda}{2} \lVert\theta\rVert^2$ to the loss are the same thing. For Adam they are not. A penalty puts $\lambda\theta$ into the gradient, where it goes through the moments and is divided by $\sqrt{\hat v_t}$:
#
# $$\text{Adam with L2: } \quad \theta_t = \theta_{t-1} - \eta\, \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}, \qquad g_t = \nabla f(\theta_{t-1}) + \lambda\, \theta_{t-1},$$
#
# so that weights with large gradients hardly decay. AdamW leaves the moments alone and adds the decay afterwards:
#
# $$\text{AdamW: } \quad \theta_t = \theta_{t-1} - \eta\, \Big( \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda\, \theta_{t-1} \Big), \qquad g_t = \nabla f(\theta_{t-1}).$$
#
# In code the two differ only in the order of the chain. To see the decay by itself, give three groups of a thousand weights gradients that are nothing but noise, ten times larger from group to group:

# %% mystnb={"image": {"alt": "Mean weight against steps for gradients of three sizes. Adam with L2 shrinks weights with small gradients fast and those with large ones hardly; AdamW shrinks all alike, on the curve of pure decay."}}
DECAY = 0.5


def adam_l2(learning_rate, weight_decay, **kwargs):
    """Adam on the loss plus a penalty: the decay goes through the ratio."""
    return optax.chain(
        ravine.add_decayed_weights(weight_decay), ravine.adam(learning_rate, **kwargs)
    )


SCALES = jnp.array([0.1, 1.0, 10.0])


def wander(tx, steps):
    """Mean of a thousand weights per scale, [steps + 1, 3], all 1 at the start."""

    def step(carry, key):
        params, state = carry
        noise = SCALES[:, None] * jax.random.normal(key, params.shape)
        updates, state = tx.update(noise, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params.mean(axis=1)

    params = jnp.ones((3, 1000))
    keys = jax.random.split(jax.random.key(0), steps)
    _, means = jax.lax.scan(step, (params, tx.init(params)), keys)
    return np.concatenate([np.ones((1, 3)), means])


fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.5), sharey=True)
for ax, tx, title, color in [
    (axes[0], adam_l2(0.01, DECAY), "Adam with L2", COLORS["Adam"]),
    (axes[1], ravine.adamw(0.01, weight_decay=DECAY), "AdamW", COLORS["AdamW"]),
]:
    means = wander(tx, 400)
    for i, dash in enumerate(["-", "--", ":"]):
        ax.plot(means[:, i], dash, color=color, label=f"gradients of size {SCALES[i]:g}")
    expected = (1 - 0.01 * DECAY) ** np.arange(401)
    ax.plot(expected, color="#222222", linewidth=0.8, label=r"$(1 - \eta\lambda)^t$")
    ax.set(title=rf"{title}, $\eta$ = 0.01, $\lambda$ = {DECAY}", xlabel="step $t$")
    ax.legend(loc=(0.48, 0.42) if ax is axes[0] else "upper right")
axes[0].set_ylabel("mean weight")
plt.show()

# %% [markdown]
# With AdamW the three groups lie on the formula, one over the other. With the penalty, only gradients of size one come close, since then the ratio divides by about one; the group with large gradients decays a tenth as fast, the one with small gradients much too fast.
#
# So much for noise. Without it, there is a second difference. Here both run down the ravine, with the star on the minimum of $f$ and the diamond on that of $f + \frac{\lambda}{2} \lVert\theta\rVert^2$:

# %% mystnb={"image": {"alt": "The ends of two paths, and a coordinate against steps: Adam with L2 stops at the minimum of the loss with the penalty, AdamW close to the minimum of the loss itself."}}
penalized = CURVATURE * LOWEST / (CURVATURE + DECAY)
l2, _ = descend(valley, adam_l2(0.05, DECAY, b2=0.99), START, 1000)
adamw, _ = descend(valley, ravine.adamw(0.05, b2=0.99, weight_decay=DECAY), START, 1000)

fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.5), width_ratios=[1.2, 1])
draw_surface(axes[0], valley, (-0.2, 1.4), (0.3, 0.7), [LOWEST])
axes[0].plot(*penalized, "D", color="#222222", markersize=6, zorder=5)
for label, path, name in [("Adam with L2", l2, "Adam"), ("AdamW", adamw, "AdamW")]:
    draw_path(axes[0], path, COLORS[name])
    axes[1].plot(path[:, 0], color=COLORS[name], label=label)
axes[0].set(title="the last part of the two paths")
axes[1].axhline(LOWEST[0], color="#222222", linewidth=0.8, label="minimum of $f$")
axes[1].axhline(
    penalized[0], color="#222222", linewidth=0.8, linestyle=":", label="minimum with penalty"
)
axes[1].set(title=r"$\theta_1$ against time", xlabel="step $t$", ylabel=r"$\theta_1$")
axes[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# Adam with L2 settles on the diamond. AdamW goes on, ever more slowly, to the minimum of the loss itself, as if there were no decay. At rest AdamW needs $\hat m / \sqrt{\hat v} = -\lambda\theta$, and the ratio has no scale: a gradient that stands still, however small, makes it $\pm 1$. So wherever $|\lambda\theta_i| < 1$ a steady gradient wins over the decay. On the way the ratio is held down to $\lambda\theta$ only because $v$ still remembers larger gradients, and it forgets them at the pace of $\beta_2$. *Without noise* AdamW is thus a bound, $|\theta_i| \le 1/\lambda$, rather than a penalty ([Xie and Li, 2024](https://arxiv.org/abs/2404.04454)); with noise, which keeps $v$ up, it pulls as in the figure before.
#
# ## 6. Lion: the sign alone
#
# Adam's ratio lies mostly between $-1$ and $1$, and at the first step it is a sign. Lion takes the sign at every step and drops the second moment:
#
# $$u_t = \operatorname{sign}\big(\beta_1 m_{t-1} + (1 - \beta_1)\, g_t\big), \qquad m_t = \beta_2 m_{t-1} + (1 - \beta_2)\, g_t, \qquad \theta_t = \theta_{t-1} - \eta\, (u_t + \lambda\, \theta_{t-1}).$$
#
# One buffer instead of two, and two decay rates for it: a long memory ($\beta_2 = 0.99$) for what is kept, and more weight on the newest gradient ($\beta_1 = 0.9$) for what is done now.

# %% mystnb={"image": {"alt": "Lion's path: diagonal steps of equal length to the floor, then a zigzag of constant width along it and past the minimum."}}
lion, _ = descend(valley, ravine.lion(0.1), START, 300)
schedule = optax.cosine_decay_schedule(0.1, 300)
lion_cosine, _ = descend(valley, ravine.lion(schedule), START, 300)
draw_strips({r"Lion, $\eta$ = 0.1, 100 steps": ("Lion", lion[:101])}, xs=(-3.5, 3.6))
plt.show()

# %% mystnb={"image": {"alt": "Left, the movement per step: Adam's shrinks towards the minimum, Lion's stays at the rate. Right, the loss: Lion's stays at a floor with a constant rate and falls with a cosine to zero; Adam's falls anyway."}}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3))
for name, path in [("Adam", adam), ("Lion", lion)]:
    moves = np.abs(np.diff(path, axis=0))
    for i, dash in enumerate(["-", "--"]):
        label = rf"{name}, $|\Delta\theta_{i + 1}|$"
        axes[0].plot(np.arange(1, 61), moves[:60, i], dash, color=COLORS[name], label=label)
axes[0].set(xlabel="step $t$", ylabel="movement in one step", ylim=(0, 0.17))
axes[0].legend(ncols=2, loc="upper right")
for label, path, name, dash in [
    ("Adam, constant rate", adam, "Adam", "-"),
    ("Lion, constant rate", lion, "Lion", "-"),
    ("Lion, cosine to zero", lion_cosine, "Lion", "--"),
]:
    axes[1].semilogy(losses(valley, path), dash, color=COLORS[name], label=label)
axes[1].set(xlabel="step $t$", ylabel=r"loss $f(\theta_t)$", xlim=(0, 300))
axes[1].legend(loc="lower left")
plt.show()


# %% [markdown]
# Every step is a diagonal of the grid, $\pm\eta$ in both coordinates at once: on the left, both of Lion's lines are the constant 0.1, while Adam's steps shorten as its gradients fall and change sign. Two things follow.
#
# - *It cannot settle.* At a constant rate Lion ends by hopping over the floor, half a step to either side: $\frac12 \cdot 100 \cdot 0.05^2 = 0.125$, the level of the solid line. A schedule that goes to zero takes it down; Lion and a decaying schedule belong together.
# - *It remembers for long.* It passes the minimum at step 41, and turns back only at step 65, after the new gradients have outweighed the old in $m$. A memory of a hundred steps is a handicap on a run of a few hundred, not on one of many thousands.
#
# As no gradient, however small, makes a step shorter than $\eta$, Lion wants a rate 3 to 10 times below Adam's, and a decay as much larger.
#
# ## 7. Which learning rate?
#
# To compare optimizers at one learning rate is to compare learning rates. So: sixty-one of them for each, from $10^{-4}$ to 10. A learning rate may be a traced value, and all the descents of an optimizer run at once under `jax.vmap`. To the two ravines come two classics. Rosenbrock's valley bends, so that its walls turn as one walks; the saddle has a minimum on either side of a ridge, and we start a thousandth off the ridge.
#
# $$f_{\text{Rosenbrock}} = (1 - \theta_1)^2 + 100\,(\theta_2 - \theta_1^2)^2, \qquad f_{\text{saddle}} = \tfrac12 (\theta_1 - 1)^2 - \tfrac12 \theta_2^2 + \tfrac14 \theta_2^4 + \tfrac14.$$
#
# The least value of each is 0. AdamW has its default decay, 0.01; momentum is 0.9; all else is default too, and the rate constant.


# %%
def rosenbrock(params):
    """A ravine that bends."""
    x, y = params
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def saddle(params):
    """Minima at (1, 1) and (1, -1), a saddle point between them."""
    x, y = params
    return 0.5 * (x - 1) ** 2 - 0.5 * y**2 + 0.25 * y**4 + 0.25


BUILDERS = {
    "SGD": ravine.sgd,
    "heavy ball": lambda rate: ravine.sgd(rate, momentum=0.9),
    "Nesterov": lambda rate: ravine.sgd(rate, momentum=0.9, nesterov=True),
    "AdaGrad": ravine.adagrad,
    "RMSProp": ravine.rmsprop,
    "Adam": ravine.adam,
    "AdamW": ravine.adamw,
    "Lion": ravine.lion,
}
SURFACES = {  # loss, start, steps
    "ravine along the axes": (valley, START, 150),
    "ravine turned by 45°": (turned, TURNED_START, 150),
    "Rosenbrock": (rosenbrock, jnp.array([-1.47, 1.53]), 300),
    "saddle": (saddle, jnp.array([-1.97, 1e-3]), 100),
}
RATES = np.logspace(-4, 1, 61)


def sweep(build):
    """The paths down all surfaces at all rates, [surfaces, rates, steps + 1, 2], as one program."""
    surfaces, starts, steps = zip(*SURFACES.values(), strict=True)

    def run(which, start, rate):
        loss = lambda params: jax.lax.switch(which, surfaces, params)
        return descend(loss, build(rate), start, max(steps))[0]

    over_rates = jax.vmap(run, in_axes=(None, None, 0))
    over_surfaces = jax.vmap(over_rates, in_axes=(0, 0, None))
    rates = jnp.asarray(RATES, jnp.float32)
    return jax.jit(over_surfaces)(jnp.arange(len(starts)), jnp.stack(starts), rates)


runs = {}
for name, build in BUILDERS.items():
    for paths, (surface, (loss, _, steps)) in zip(sweep(build), SURFACES.items(), strict=True):
        values = losses(loss, paths)
        values = np.where(np.isfinite(values), values, np.inf)
        runs[surface, name] = paths[:, : steps + 1], values[:, : steps + 1]


def chosen(surface, name):
    """Index of the smallest rate that ends within three times the best, below 1e-4 all alike."""
    final = np.maximum(runs[surface, name][1][:, -1], 1e-4)
    return int(np.argmax(final <= 3 * final.min()))


# %% mystnb={"image": {"alt": "The last loss of eight optimizers against the learning rate, on four surfaces: a valley for each optimizer, with a steep edge to the right beyond which it diverges. The valleys lie at rates that differ by factors of a hundred and more."}}
TOP, BOTTOM = 1e3, 1e-10
fig, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex=True, sharey=True)
for ax, surface in zip(axes.flat, SURFACES, strict=True):
    for name in BUILDERS:
        final = np.clip(runs[surface, name][1][:, -1], BOTTOM, TOP)
        i = chosen(surface, name)
        ax.loglog(RATES, final, color=COLORS[name], label=name, linewidth=1.3)
        ax.plot(RATES[i], final[i], "o", color=COLORS[name], markersize=6)
    ax.set(title=f"{surface}, {SURFACES[surface][2]} steps")
for ax in axes[-1]:
    ax.set_xlabel(r"learning rate $\eta$")
for ax in axes[:, 0]:
    ax.set_ylabel("loss after the last step")
fig.legend(
    *axes[0, 0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=8,
    columnspacing=1.2,
    handlelength=1.5,
)
plt.show()

print("decades of learning rate that end below a loss of 0.1, of the five tried")
print(f"{'':10}" + "".join(f"{surface:>23}" for surface in SURFACES))
for name in BUILDERS:
    widths = [np.sum(runs[surface, name][1][:, -1] < 0.1) / 12 for surface in SURFACES]
    print(f"{name:10}" + "".join(f"{width:23.1f}" for width in widths))


# %% [markdown]
# A line on the upper edge has diverged, or as good as; one on the lower edge is at $10^{-10}$ or below. The dot is the rate used in the next section: the smallest that does about as well as the best.
#
# - *SGD, heavy ball and Nesterov have a cliff.* Beyond the limit that the steepest wall sets they diverge, and on all but the saddle SGD and Nesterov are at their best just short of it. Momentum does at a tenth of the rate what SGD does, and its window is wider.
# - *The ratio takes the cliff away.* The steps of AdaGrad, RMSProp and Adam are in proportion to $\eta$ and not to the gradient, so a rate too high is a matter of degree. On the ravines and the saddle Adam works over about two decades or more.
# - *The turn* changes nothing for the first three, and costs AdaGrad and RMSProp everything they had gained. Adam still gets below $10^{-5}$: by its momentum, since its ratio is as blind as theirs.
# - *Rosenbrock* leaves every window narrow. The dips of AdaGrad and RMSProp are two or three rates wide, which is how luck looks in a sweep.
# - *Lion* at a constant rate has to choose between too slow (to the left of its dot) and hopping (to the right); how far from the minimum its grid of steps happens to lie makes the jags.
# - *AdamW*, at its best, ends higher than Adam on all but the saddle, for the reason of section 5: it arrives where the ratio balances the decay, and from there goes at the pace at which $v$ forgets.
#
# Two dimensions and no noise: this shows what each term does, and not which optimizer to train a language model with.
#
# ## 8. Down the slopes


# %% mystnb={"image": {"alt": "Eight paths down the ravine turned by 45 degrees, each at a good rate. Adam and the two with momentum come closest to the minimum; SGD, AdaGrad, RMSProp, AdamW and Lion stay further away."}}
def small_multiples(surface, xs, ys, minima, levels=8):
    """One panel per optimizer, each at the rate chosen above."""
    loss, _, steps = SURFACES[surface]
    fig, axes = plt.subplots(2, 4, figsize=(9.4, 5.5), sharex=True, sharey=True)
    for ax, name in zip(axes.flat, BUILDERS, strict=True):
        i = chosen(surface, name)
        paths, values = runs[surface, name]
        draw_surface(ax, loss, xs, ys, minima, levels)
        draw_path(ax, paths[i], COLORS[name], markersize=3, linewidth=1)
        ax.set(title=rf"{name}, $\eta$ = {RATES[i]:.2g}" + f"\nlast loss {values[i, -1]:.1e}")
        ax.label_outer()
    fig.suptitle(f"{surface}, {steps} steps")
    plt.show()


small_multiples("ravine turned by 45°", (-3.5, 2.5), (-3.5, 2.5), [LOWEST])

# %% [markdown]
# Where dots run together into a thick line, the optimizer crawls: SGD, AdaGrad and RMSProp, none of which gets to the star. Heavy ball, Nesterov and Adam get there, the first and the last in the same swinging way. AdamW follows Adam until decay holds it back. Lion comes close partly because the floor now lies along one of its diagonals.

# %% mystnb={"image": {"alt": "Eight paths through Rosenbrock's curved valley, each at a good rate. RMSProp leaps about; the others follow the curve, and AdamW, pulled towards the origin, stops short of the minimum."}}
small_multiples("Rosenbrock", (-2, 2), (-1, 4), [(1, 1)], 7)

# %% [markdown]
# SGD gets down the wall and then crawls. The heavy ball clatters between the walls and ends lowest. Nesterov takes the same bend with fewer swings, Adam too. AdaGrad and RMSProp, at these rates, throw the first step clean across the bend and come down near the minimum from there; RMSProp leaves the picture on its way. That is the luck of the sweep: at half the rate, RMSProp ends at a loss of 0.8. AdamW, at the smaller rate that suits it, gets no further than SGD. Lion walks the whole floor in steps of 0.012.

# %% mystnb={"image": {"alt": "Eight paths from beside a saddle. SGD, heavy ball and Nesterov go to the saddle first and then turn to a minimum; those with a rate for each coordinate turn at once."}}
small_multiples("saddle", (-2.2, 3.2), (-1.8, 1.8), [(1, 1), (1, -1)], 14)

# %% [markdown]
# At the start the gradient points almost exactly along the ridge. SGD, heavy ball and Nesterov follow it to the saddle point and only there turn off; the others leave the ridge with their first steps. How far off it they are, step by step:

# %% mystnb={"image": {"alt": "Distance from the ridge of the saddle on a logarithmic scale: with a rate for each coordinate it is large within twenty steps; SGD, heavy ball and Nesterov take about seventy."}}
fig, ax = plt.subplots(figsize=(8.5, 3.2))
for name in BUILDERS:
    path = runs["saddle", name][0][chosen("saddle", name)]
    ax.semilogy(np.abs(path[:, 1]), color=COLORS[name], label=name)
ax.set(xlabel="step $t$", ylabel=r"distance from the ridge, $|\theta_2|$")
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# Near the ridge the gradient across it is $-\theta_2$, so SGD grows by a factor of $1 + \eta$ per step: an exponential, a straight line here, and a wait of some seventy steps, which momentum at the rates chosen hardly shortens. For the other five (AdamW's line covers Adam's) a gradient of a thousandth is as good as one of a thousand: the first step is $\eta$, or $10\,\eta$ for RMSProp. The same indifference to size makes them amplify what is only noise, where there is noise.
#
# ## What to take along
#
# | term | what it is for | what it costs |
# |---|---|---|
# | velocity $m$ | cancels swings, adds up what persists: $\sqrt\kappa$ for $\kappa$, however the ravine lies | overshoot; one buffer |
# | root of squares, $\sqrt v$ | each coordinate its own rate; the scale of the gradient cancels | helps only along the axes; one buffer |
# | bias correction | first steps of the size asked for | nothing |
# | decay outside the ratio | every weight decays alike | it is no longer a penalty on the loss |
# | sign | one buffer less, steps known beforehand | cannot settle without a schedule |
#
# To try:
#
# 1. Set `DECAY = 2.0` in section 5. Where does $\theta_1$ of AdamW come to rest, and why there?
# 2. Give Lion a cosine schedule inside the sweep, `lambda rate: ravine.lion(optax.cosine_decay_schedule(rate, 150))`. What becomes of its window on the ravine?
# 3. Which of Adam's paths change with `ravine.adam(rate, nesterov=True)`?
# 4. Turn the ravine by 10° instead of 45°. How much of the gain of AdaGrad survives?
