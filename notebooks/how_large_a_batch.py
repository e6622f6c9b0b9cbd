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
# # How large a batch
#
# Twice the batch never needs twice as few steps for long. Up to some size it almost does; beyond it, further samples are wasted. This lesson derives that size, estimates it from the gradients of a single run, and then measures it the expensive way, on a problem small enough that the exact answer can be written down.
#
# The problem is linear regression down a ravine: inputs $x$ with covariance $H = \operatorname{diag}(h)$, curvatures from 1 to 1/32, labels $y = x^\top w^\star + \varepsilon$ with noise of variance $\sigma^2$. With $\Delta = w - w^\star$ the loss above its minimum is $F = \frac12 \Delta^\top H \Delta$.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine.stability import noise_scale, squared_norms, with_noise_scale
from ravine.training.batch_size.fit import fit_critical_batch
from ravine.training.colours import PICTURES
from ravine.training.gradients import micro_batch_value_and_grad

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
D, SIGMA = 32, 0.5
CURVATURE = 1.0 / np.arange(1, D + 1)
START = np.sqrt(1.0 / CURVATURE.sum())  # every coordinate is so far from the minimum


def draw(key, batch):
    """Inputs and the noise of their labels."""
    for_x, for_noise = jax.random.split(key)
    x = jax.random.normal(for_x, (batch, D)) * np.sqrt(CURVATURE)
    return x, SIGMA * jax.random.normal(for_noise, (batch,))


def loss(delta, batch):
    x, noise = batch
    return 0.5 * jnp.mean((x @ delta - noise) ** 2)


excess = lambda delta: 0.5 * jnp.sum(CURVATURE * delta**2, axis=-1)
start = jnp.full(D, START)
print(f"loss above the minimum at the start: {excess(start):.2f}")

# %% [markdown]
# ## 1. One step, and what it is worth
#
# Let $G$ be the true gradient and $\Sigma$ the covariance of the gradient of one sample. A batch of $B$ gives $g = G + \text{noise}$ with covariance $\Sigma / B$. A step $-\eta g$ changes the loss, on average, by
#
# $$\mathbb{E}[\delta F] = -\eta\, |G|^2 + \tfrac12 \eta^2 \Big( G^\top H G + \frac{\operatorname{tr}(H \Sigma)}{B} \Big).$$
#
# Noise costs nothing in the first term and something in the second: it makes long steps dangerous. The best $\eta$, and what it gains, are
#
# $$\eta(B) = \frac{\eta_{\max}}{1 + \mathcal{B} / B}, \qquad \delta F(B) = \frac{\delta F_{\max}}{1 + \mathcal{B} / B}, \qquad \mathcal{B} = \frac{\operatorname{tr}(H \Sigma)}{G^\top H G}.$$
#
# $\mathcal{B}$ is the **gradient noise scale**. For $B \ll \mathcal{B}$ the gain is in proportion to $B$: twice the batch, half the steps, the same samples. For $B \gg \mathcal{B}$ it is $\delta F_{\max}$ whatever $B$: the same steps, twice the samples. If every step of a run is like that, the steps $S$ and the samples $E = B S$ to a given loss are
#
# $$S = S_{\min} \Big( 1 + \frac{\mathcal{B}}{B} \Big), \qquad E = E_{\min} \Big( 1 + \frac{B}{\mathcal{B}} \Big), \qquad \Big( \frac{S}{S_{\min}} - 1 \Big) \Big( \frac{E}{E_{\min}} - 1 \Big) = 1,$$
#
# a hyperbola ([McCandlish et al., 2018](https://arxiv.org/abs/1812.06162)). At $B = \mathcal{B}$ one pays twice the least number of steps and twice the least number of samples. That is the *critical batch size*: a bargain on both sides of which one of the two gets expensive.
#
# If all curvatures were equal, $H$ would cancel, and what remains is easier to estimate:
#
# $$\mathcal{B}_{\text{simple}} = \frac{\operatorname{tr} \Sigma}{|G|^2}.$$
#
# For our regression everything is known: $G = H \Delta$, and $\Sigma = (\Delta^\top H \Delta + \sigma^2) H + H \Delta \Delta^\top H$.


# %%
def scales(delta):
    """The exact noise scale, and the simple one, at a point."""
    gradient = CURVATURE * delta
    strength = np.sum(CURVATURE * delta**2) + SIGMA**2
    diagonal = strength * CURVATURE + gradient**2  # of Sigma
    exact = np.sum(CURVATURE * diagonal) / np.sum(CURVATURE * gradient**2)
    return exact, diagonal.sum() / np.sum(gradient**2)


for share in (1.0, 0.3, 0.1, 0.03):
    exact, simple = scales(np.full(D, START * np.sqrt(share)))
    print(f"loss {0.5 * share:.3f} above the minimum: exact {exact:6.1f}, simple {simple:6.1f}")

# %% [markdown]
# Both grow as the loss falls: the signal $|G|^2$ goes to zero, and the noise of the labels stays. That is general, and the reason why large runs start with small batches and ramp them up (`ravine.schedules.batch_ramp`).
#
# ## 2. Estimating it while training
#
# The norm of a batch's gradient is biased, since noise has a length too: $\mathbb{E}\,|g_B|^2 = |G|^2 + \operatorname{tr} \Sigma / B$. Two batch sizes give two equations. Training already has both: the micro-batches of size $b$ that gradients are accumulated over, or that devices compute, and their mean of size $B$:
#
# $$|G|^2 \approx \frac{B\, |g_B|^2 - b\, \overline{|g_b|^2}}{B - b}, \qquad \operatorname{tr} \Sigma \approx \frac{\overline{|g_b|^2} - |g_B|^2}{1/b - 1/B}.$$
#
# Each estimate is unbiased and very noisy; their ratio would be biased. So both are averaged over steps first, and then divided. `with_noise_scale` around an optimizer does it, from `micro_batch_value_and_grad`:

# %%
STEPS = 150 if SMOKE else 600
MICRO, BATCH = 16, 64


def run(rate, seed=0):
    """Losses above the minimum, estimates and the truth along one run of SGD."""
    tx = with_noise_scale(ravine.sgd(rate), decay=0.95)
    measured = micro_batch_value_and_grad(
        lambda params, batch: loss(params["kernel"], batch),
        BATCH // MICRO,
        tokens=lambda batch: len(batch[1]),
        measure=squared_norms,
    )

    def step(carry, key):
        params, state = carry
        _, grads, micro = measured(params, draw(key, BATCH))
        updates, state = tx.update(grads, state, params, micro_batches=micro)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["kernel"], noise_scale(state)["noise_scale"])

    params = {"kernel": start}
    keys = jax.random.split(jax.random.key(seed), STEPS)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[1])()


deltas, estimated = run(0.05)
truth = np.array([scales(delta)[1] for delta in np.asarray(deltas)])

# %% mystnb={"image": {"alt": "Noise scale against steps: the estimate follows the exact value, which rises from about fourteen to more than a thousand while the loss falls."}}
fig, ax = plt.subplots(figsize=(7, 3))
ax.semilogy(truth, color="#222222", label=r"tr $\Sigma$ / $|G|^2$, exact")
ax.semilogy(
    np.where(estimated > 0, estimated, np.nan), color="#0072B2", label="estimated while training"
)
ax.semilogy(200 * np.asarray(excess(deltas)), color="#D55E00", linestyle="--", label="loss x 200")
ax.set(xlabel="step", ylabel="samples")
ax.legend()
plt.show()
for at in (20, 60, 120):
    print(f"step {at:3}: exact {truth[at]:4.0f}, estimated {estimated[at]:4.0f}")

# %% [markdown]
# The estimate costs nothing but a few sums, and follows the truth with the delay of its average. Late in the run, where the signal is a small difference of large numbers, it scatters.
#
# ## 3. Measuring what it is for
#
# The noise scale rests on a picture of one step. The direct way asks for the thing itself: the steps to a given loss, at many batch sizes, each with its own best learning rate. That last part matters: with one rate for all, a sweep over batch sizes measures how well that rate suits each.

# %%
TARGET = 0.03
BATCHES = [2, 4, 8, 16, 32, 64, 128, 256]
SEEDS = 2 if SMOKE else 4
RATES = np.geomspace(0.05, 1.8, 8 if SMOKE else 16)
LIMIT = 1500 if SMOKE else 3000


def steps_to_target(build, rates, batch):
    """Steps until the loss, averaged over a few steps, is at the target: [rates, seeds]."""

    def one(rate, key):
        tx = build(rate)

        def step(carry, key):
            delta, state, mean = carry
            grads = jax.grad(loss)(delta, draw(key, batch))
            updates, state = tx.update(grads, state, delta)
            delta = optax.apply_updates(delta, updates)
            mean = 0.9 * mean + 0.1 * excess(delta)
            return (delta, state, mean), mean

        carry = start, tx.init(start), excess(start)
        means = jax.lax.scan(step, carry, jax.random.split(key, LIMIT))[1]
        there = means <= TARGET
        return jnp.where(there.any(), jnp.argmax(there) + 1, jnp.inf)

    keys = jax.random.split(jax.random.key(7), SEEDS)
    many = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return np.asarray(jax.jit(many)(jnp.asarray(rates, jnp.float32), keys))


def sweep(build, rates):
    """Of each batch size, the steps of every seed at the best rate, and that rate."""
    steps, best = {}, {}
    for batch in BATCHES:
        found = steps_to_target(build, rates, batch)
        row = int(np.argmin(found.mean(1)))
        steps[batch], best[batch] = found[row].tolist(), float(rates[row])
    return steps, best


steps, best = sweep(ravine.sgd, RATES)
critical = fit_critical_batch(steps)
print("batch  best rate  steps    samples")
for batch in BATCHES:
    mean = np.mean(steps[batch])
    print(f"{batch:5} {best[batch]:9.3f} {mean:7.0f} {batch * mean:10.0f}")
print(
    f"\nfit: at least {critical.steps:.0f} steps, critical batch {critical.batch:.0f} "
    f"(90 %: {critical.low:.0f} to {critical.high:.0f})"
)

# %% mystnb={"image": {"alt": "Left: steps against the batch size, falling in proportion at first and level later, on the fitted curve. Right: steps against samples, a hyperbola with the critical batch at its corner."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3))
curve = np.geomspace(BATCHES[0], BATCHES[-1], 100)
fitted = critical.steps * (1 + critical.batch / curve)
for batch in BATCHES:
    left.loglog([batch] * SEEDS, steps[batch], ".", color="#0072B2")
    right.loglog(batch * np.array(steps[batch]), steps[batch], ".", color="#0072B2")
left.loglog(curve, fitted, color="#D55E00")
left.axvline(critical.batch, color="#888888", linewidth=0.8, linestyle="--")
left.set(xlabel="batch size", ylabel="steps to the target")
right.loglog(curve * fitted, fitted, color="#D55E00")
right.plot(2 * critical.batch * critical.steps, 2 * critical.steps, "o", color="#222222")
right.annotate(
    "critical batch:\ntwice the least of both",
    (2 * critical.batch * critical.steps, 2 * critical.steps),
    xytext=(8, 18),
    textcoords="offset points",
)
right.set(xlabel="samples to the target")
for ax, values in ((left, BATCHES), (right, [500, 1000, 2000, 4000, 8000])):
    ax.minorticks_off()
    ax.set_xticks(values, map(str, values))
    ax.set_yticks([30, 60, 120, 240], ["30", "60", "120", "240"])
plt.show()

# %% [markdown]
# The corner of the hyperbola is the bargain. To its left, a larger batch is free: nearly the same samples in fewer steps, which is what more devices are for. To its right every further halving of the steps costs a multiple of the samples, and in the end no number of samples buys another step.
#
# How does it compare with the noise scale? The runs start where the exact one is 8 and end, at a loss of 0.03, where it is near 30 (section 1). The critical batch of the whole run lies in between, as an average over it should.
#
# ## 4. What else to change with the batch
#
# Section 1 also says what the best learning rate does: $\eta = \eta_{\max} / (1 + \mathcal{B} / B)$, in proportion to $B$ below the critical size, and constant above. That is the *linear scaling rule* of SGD, with its limit built in. For Adam a step has the same length whatever the gradient's, and the share of signal in it grows as $\sqrt B$; so does its best rate.

# %%
adam_steps, adam_best = sweep(lambda rate: ravine.adam(rate, b1=0.0, b2=0.99), RATES / 12)

# %% mystnb={"image": {"alt": "Best learning rate against batch size, for SGD and Adam: SGD's rises nearly in proportion at first, Adam's as the square root; both level off."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
small = np.array(BATCHES[:5])
for name, rates, power, color in (
    ("SGD", best, 1.0, "#E69F00"),
    ("Adam", adam_best, 0.5, "#5F5F5F"),
):
    values = np.array([rates[batch] for batch in BATCHES])
    ax.loglog(BATCHES, values / values[0], "o-", color=color, label=name)
    ax.loglog(small, (small / small[0]) ** power, ":", color=color)
ax.set(xlabel="batch size", ylabel="best rate, relative to batch 2")
ax.legend()
plt.show()
print("four times the batch, by the rules:")
for rule in ("linear", "sqrt"):
    rate = ravine.schedules.scale_learning_rate(1.0, 4, rule=rule)
    print(f"  {rule:6} {float(rate):.0f} times the rate")

# %% [markdown]
# The dotted lines are the two rules, from the smallest batch on. The dots follow them while the batch is small, and fall behind as it comes near the critical size. (Their steps are those of the grid of rates.)
#
# Other things change with the batch as well, since a step then holds more samples: decay rates keep their half-life in tokens, $\beta \to \beta^{\kappa}$ for $\kappa$ times the batch, and Adam's coupled weight decay grows as $\sqrt\kappa$. `ravine.training.batch_size.rescale.rescaled` applies them all.
#
# ## For a language model
#
# `python -m ravine batch-size` does what section 3 did: from one state of a run, branches train at several batch sizes and rates, and the fit gives the critical batch with its interval. For a model of 0.85 million parameters, 100 to 200 steps into training, it was 9,600 tokens, and the noise scale there 8,000 ([the guide](../docs/batch_size.md)).
#
# ## What to take along
#
# | | |
# |---|---|
# | noise scale | $\operatorname{tr}\Sigma / |G|^2$: the batch at which noise equals signal; grows as the loss falls |
# | below it | twice the batch, half the steps, the same samples: use more devices |
# | above it | twice the batch, the same steps, twice the samples: wasted |
# | rate | in proportion to $B$ for SGD, to $\sqrt B$ for Adam, up to the critical batch |
# | to find it | watch `noise_scale` in a run, or measure with `batch-size` |
#
# To try:
#
# 1. Set `SIGMA = 0.0` at the top. The noise scale no longer grows: why not?
# 2. Set `TARGET = 0.01`. Where does the critical batch go?
# 3. In section 3 use one rate for all batch sizes. Which critical batch does the fit find then?
# 4. Give section 3 `lambda rate: ravine.sgd(rate, momentum=0.9)`, with rates a tenth as large.
