# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Looking ahead
#
# A gradient is taken where the parameters are. Three algorithms ask for it somewhere else: Nesterov's where the velocity is about to carry them, Adan's at the same place but without going there, Schedule-Free's between where they are and where they have been on average. This lesson shows what each gains by it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine.training.colours import PICTURES

plt.rcParams.update(PICTURES)
H = jnp.array([1.0, 100.0])
START = jnp.array([3.0, 1.0])
value = lambda theta: 0.5 * jnp.sum(H * theta**2, axis=-1)


def descend(tx, steps=80, start=START, gradient=lambda theta: H * theta):
    """The points visited."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=steps)[1])
    return np.concatenate([start[None], run()])


# %% [markdown]
# ## 1. Nesterov
#
# The heavy ball adds the gradient *here* to its velocity, and then moves. Nesterov moves by the old velocity first, takes the gradient *there*, and corrects:
#
# $$v_t = \mu v_{t-1} - \eta\, \nabla f(\phi_{t-1} + \mu v_{t-1}), \qquad \phi_t = \phi_{t-1} + v_t.$$
#
# If the velocity is about to climb a wall, the gradient over there says so one step earlier. In a training loop it is awkward to evaluate a gradient at other parameters than those one has, so libraries keep the look-ahead points themselves, $\theta_t = \phi_t + \mu v_t$. In terms of these the same algorithm reads
#
# $$m_t = \mu m_{t-1} + g_t, \qquad \theta_t = \theta_{t-1} - \eta\, (g_t + \mu m_t), \qquad g_t = \nabla f(\theta_{t-1}).$$
#
# The two, side by side:

# %%
RATE, MU = 0.01, 0.9
phi, v, original = START, jnp.zeros(2), []
for _ in range(80):
    v = MU * v - RATE * H * (phi + MU * v)
    phi = phi + v
    original.append(phi + MU * v)  # the point at which the next gradient is taken
nesterov = descend(ravine.sgd(RATE, momentum=MU, nesterov=True))
print(f"look-ahead points, furthest apart: {np.abs(np.array(original) - nesterov[1:]).max():.0e}")

# %% mystnb={"image": {"alt": "Left: coordinate across the ravine against steps; the heavy ball rings for forty steps, Nesterov is at rest after two. Right: loss against steps; both fall at similar pace, Nesterov more smoothly."}}
ball = descend(ravine.sgd(RATE, momentum=MU))
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.1))
for path, name, color in ((ball, "heavy ball", "#0072B2"), (nesterov, "Nesterov", "#D55E00")):
    left.plot(path[:, 1], color=color, label=name)
    right.semilogy(value(path), color=color)
left.set(xlabel="step", ylabel="coordinate across the ravine")
right.set(xlabel="step", ylabel="loss")
left.legend()
plt.show()

# %% [markdown]
# Across the ravine the look ahead damps: the factor per step is $\sqrt{\mu}$ for the heavy ball and $\sqrt{\mu (1 - \eta h)}$ for Nesterov, less the steeper it is. Along the ravine the two are alike ([Down the ravine](down_the_ravine.ipynb) derives it).
#
# ## 2. Adan: the difference instead of the detour
#
# Adam with Nesterov's correction is NAdam (`ravine.nadam`). Adan goes one step further back: it estimates the gradient at the look-ahead point from the last two gradients. To first order, with $\Delta\theta = \theta_{t-1} - \theta_{t-2}$ the step just made,
#
# $$\nabla f(\theta_{t-1} + \beta\, \Delta\theta) \approx g_t + \beta\, (g_t - g_{t-1}),$$
#
# exact on a quadratic. So Adan keeps a mean of gradients, one of their *differences*, and one of the squares of the look-ahead gradient:
#
# $$m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)(g_t - g_{t-1}),$$
# $$n_t = \beta_3 n_{t-1} + (1 - \beta_3) \big( g_t + \beta_2 (g_t - g_{t-1}) \big)^2, \qquad \theta_t = \theta_{t-1} - \eta\, \frac{\hat m_t + \beta_2 \hat v_t}{\sqrt{\hat n_t} + \epsilon}.$$
#
# The estimate first, and then the three down a ravine turned by 45°:

# %%
BETA = 0.92
there = H * (nesterov[5] + BETA * (nesterov[5] - nesterov[4]))
estimate = H * nesterov[5] + BETA * (H * nesterov[5] - H * nesterov[4])
print("gradient ahead", np.asarray(there), " by differences", np.asarray(estimate))

TURN = np.array([[1.0, -1.0], [1.0, 1.0]], np.float32) / np.sqrt(2).astype(np.float32)
turned = lambda theta: TURN @ (H * (TURN.T @ theta))
ADAPTIVE = {
    "adam": (ravine.adam, "#5F5F5F"),
    "nadam": (ravine.nadam, "#E69F00"),
    "adan": (ravine.adan, "#117733"),
}
RATES = np.geomspace(0.02, 1.0, 12)
paths, rates = {}, {}
for name, (build, _) in ADAPTIVE.items():
    tried = [descend(build(float(rate)), 150, TURN @ START, turned) for rate in RATES]
    ends = [float(np.mean(value(path @ TURN)[-20:])) for path in tried]
    paths[name], rates[name] = tried[int(np.argmin(ends))], RATES[int(np.argmin(ends))]

# %% mystnb={"image": {"alt": "Left: paths of Adam, NAdam and Adan down a turned ravine, each at the best of twelve rates. Right: their losses against steps."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))
for name, (_, color) in ADAPTIVE.items():
    left.plot(*paths[name].T, ".-", color=color, markersize=3, linewidth=0.8, label=name)
    right.semilogy(value(paths[name] @ TURN), color=color, label=f"{name}, {rates[name]:.2f}")
left.plot(0, 0, "*", color="#222222", markersize=10)
left.set(aspect="equal")
right.set(xlabel="step", ylabel="loss")
right.legend(fontsize="small")
plt.show()
for name, path in paths.items():
    print(
        f"{name:6} rate {rates[name]:.2f}: mean loss of the last 20 steps {value(path @ TURN)[-20:].mean():.1e}"
    )

# %% [markdown]
# One ravine and no noise decides nothing about training. (Adan's momentum reaches back fifty steps, $\beta_1 = 0.98$ with its authors, and overshoots in a run of 150.) Differences of gradients are also where noise is largest, twice the variance of one. What Adan costs is plain: four buffers where Adam has two (the last gradient is one), 16 bytes per parameter.
#
# ## 3. Schedule-Free: an average instead of a decay
#
# With noise a constant rate ends at a floor, and a decaying one goes below it, but only at the end, which has to be known beforehand ([Training as stochastic optimization](stochastic_optimization.ipynb)). The other way to be rid of noise is to average the iterates. Schedule-Free keeps two sequences and takes gradients between them:
#
# $$y_t = (1 - \beta)\, z_t + \beta\, x_t, \qquad z_{t+1} = z_t - \eta\, \nabla f(y_t), \qquad x_{t+1} = \Big(1 - \frac{1}{t+1}\Big) x_t + \frac{1}{t+1}\, z_{t+1}.$$
#
# $z$ walks like SGD, $x$ is its plain average, and $y$ is where the gradient is looked up. With $\beta = 0$ that is averaging after the fact (Polyak); with $\beta = 1$ the gradient is taken at the average, which is momentum in disguise. In between, at 0.9, it has the stability of the one and the speed of the other.
#
# **Two sets of parameters**: training holds $y$; evaluate and keep $x$, by `ravine.schedule_free_eval_params`. On a noisy ravine of 40 curvatures, against runs that decay to zero for four lengths, each at its best rate:

# %%
CURVATURES = jnp.geomspace(0.01, 1.0, 40)
NOISE, RUNS, LONG = 0.3, 32, 800
LENGTHS = (100, 200, 400, 800)
above = lambda theta: 0.5 * jnp.mean(jnp.sum(CURVATURES * theta**2, axis=-1))


def noisy(tx, steps, evaluated=lambda state, params: params):
    """The mean loss of many runs after every step, at the parameters that are evaluated."""

    def step(carry, key):
        params, state = carry
        grads = CURVATURES * params + NOISE * jax.random.normal(key, params.shape)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), above(evaluated(state, params))

    params = jnp.ones((RUNS, len(CURVATURES)))
    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1]


def best(build, grid, steps, **options):
    """The run with the lowest end over a grid of rates, and its rate."""
    run = jax.jit(jax.vmap(lambda rate: noisy(build(rate), steps, **options)))
    found = np.asarray(run(jnp.asarray(grid, jnp.float32)))
    row = int(np.nanargmin(found[:, -1]))
    return found[row], grid[row]


GRID = np.geomspace(0.02, 1.5, 12)
constant = best(ravine.sgd, GRID, LONG)
decayed = {
    length: best(lambda rate, n=length: ravine.sgd(lambda t: rate * (1 - t / n)), GRID, length)
    for length in LENGTHS
}
free = best(
    lambda rate: ravine.schedule_free_sgd(rate, b1=0.9),
    np.geomspace(0.05, 8.0, 12),
    LONG,
    evaluated=ravine.schedule_free_eval_params,
)

# %% mystnb={"image": {"alt": "Loss against steps. Four runs that decay to zero each end low at their own length; one Schedule-Free run passes a little above all four ends; the constant rate stays above both."}}
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.loglog(
    np.arange(1, LONG + 1), constant[0], color="#8A8A8A", label=f"constant, {constant[1]:.2f}"
)
for length, (losses, _) in decayed.items():
    ax.loglog(np.arange(1, length + 1), losses, color="#E69F00", linewidth=1)
    ax.loglog(length, losses[-1], "o", color="#E69F00")
ax.loglog([], [], "o-", color="#E69F00", label="decay to zero, four lengths")
ax.loglog(np.arange(1, LONG + 1), free[0], color="#0072B2", label=f"Schedule-Free, {free[1]:.2f}")
ax.set(xlabel="step", ylabel="loss above the minimum")
ax.legend()
plt.show()
print("length   decay to zero   Schedule-Free there   constant there")
for length, (losses, _) in decayed.items():
    print(
        f"{length:6} {losses[-1]:15.4f} {free[0][length - 1]:21.4f} {constant[0][length - 1]:16.4f}"
    )

# %% [markdown]
# One run in the place of four, and it may be stopped anywhere. It is not free of charge here: it ends 20 to 60 % above runs that knew their length, and below the best constant rate. Two rules go with it: the rate warms up and then stays (a schedule that decays would be averaged twice), and it is larger than SGD's with a schedule would be, since averaging takes the noise.
#
# ## What to take along
#
# | | where the gradient is taken | what it gains | what it costs |
# |---|---|---|---|
# | Nesterov | where the velocity leads | damping across the ravine | nothing |
# | NAdam | the same, for Adam | the same | nothing |
# | Adan | the same, estimated from differences | no detour; a third moment | 16 bytes per parameter; noise of differences |
# | Schedule-Free | between iterate and average | no length to know beforehand | a second copy of the parameters; two modes |
#
# To try:
#
# 1. Section 1 with `RATE = 0.019`. Which of the two survives, and why? (See $1 - \eta h$.)
# 2. Section 2 with `ravine.adan(rate, b2=0.5)`: less of the difference.
# 3. Section 3 with `b1=0.0` and `b1=0.98`. Which is near Polyak's averaging?
# 4. Section 3 with `NOISE = 0.0`. Is an average still a good idea?
