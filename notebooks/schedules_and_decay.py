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
# # Schedules and decay
#
# The learning rate of a long run goes up, stays or bends, and goes down; weight decay pulls on the weights all the while. This lesson asks what each phase is for, what is left of an update made long ago, and why weight decay behaves like a second learning rate.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine import schedules as s
from ravine.training.colours import PICTURES

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
T, WARMUP = 1000, 50
SHAPES = {
    "constant": lambda peak: s.constant(peak),
    "cosine to a tenth": lambda peak: s.cosine(peak, T, end_ratio=0.1),
    "cosine to zero": lambda peak: s.cosine(peak, T),
    "linear to zero": lambda peak: s.decay_to_zero(peak, T),
    "WSD": lambda peak: s.wsd(peak, T),
    "SGDR": lambda peak: s.sgdr(peak, T),
}
COLORS = dict(
    zip(SHAPES, ("#8A8A8A", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True)
)

# %% [markdown]
# ## 1. The shapes
#
# A schedule is a function from the count of updates to a rate. With $x = t / T$ the share of the run that is over:
#
# | | $\eta_t / \eta$ | |
# |---|---|---|
# | cosine | $e + (1 - e)\,\frac12 (1 + \cos \pi x)$ | with $e = 0.1$ in GPT-3 and LLaMA |
# | linear to zero | $1 - x$ | |
# | WSD | 1, then in the last fifth $1 - \sqrt{x'}$ down to zero | warm-up, stable, decay: the length may stay open |
# | SGDR | cosines that start again, each twice as long | snapshots at the ends of its cycles |
#
# In front of each goes a **warm-up**, here linear. The first updates are special: the second moment of Adam rests on a handful of gradients, so that its steps are nearly signs; the loss is steep in directions that later go quiet; and the weights are small, so that a given step turns them further. A few hundred to a few thousand steps at growing rates get past that.

# %% mystnb={"image": {"alt": "Six schedules over a run with a short warm-up: constant, cosine to a tenth, cosine to zero, linear to zero, WSD flat until four fifths, and SGDR with three cycles."}}
fig, axes = plt.subplots(2, 3, figsize=(8.5, 3.6), sharex=True, sharey=True)
counts = np.arange(T + 1)
for ax, (name, shape) in zip(axes.flat, SHAPES.items(), strict=True):
    ax.plot(s.warmup(shape(1.0), WARMUP)(counts), color=COLORS[name])
    ax.set_title(name, fontsize=10)
fig.supxlabel("updates made")
fig.supylabel("rate / peak")
plt.show()
print(s.describe(s.warmup(s.wsd(1.0, T), WARMUP)))

# %% [markdown]
# ## 2. Why down, and how far
#
# Take a ravine with curvatures $h_i$ and gradients with noise of variance $\sigma^2$ in each coordinate. The mean square of a coordinate follows exactly
#
# $$\mathbb{E}[\theta_{t+1}^2] = (1 - \eta_t h)^2\, \mathbb{E}[\theta_t^2] + \eta_t^2 \sigma^2.$$
#
# The first term is progress and wants $\eta$ large, above all for the small curvatures. The second is noise, and wants it small, but only at the end: what an early step adds, later ones contract away. So go fast first and quietly last. The same recurrence with every schedule and many peaks, no sampling needed:

# %%
CURVATURE = np.geomspace(0.005, 1.0, 60)
SIGMA2 = 0.05
PEAKS = np.geomspace(0.01, 1.6, 40)


def excess(shape, peak):
    """The mean loss above the minimum after every step."""
    square, values = np.ones_like(CURVATURE), []
    for rate in np.asarray(shape(float(peak))(np.arange(T)), np.float64):
        square = (1 - rate * CURVATURE) ** 2 * square + rate**2 * SIGMA2
        values.append(0.5 * np.sum(CURVATURE * square))
    return np.array(values)


ends = {
    name: np.array([excess(shape, peak)[-1] for peak in PEAKS]) for name, shape in SHAPES.items()
}
best = {name: PEAKS[np.argmin(values)] for name, values in ends.items()}
print(f"{'':18} best peak   loss at the end")
for name, values in ends.items():
    print(f"{name:18} {best[name]:9.3f} {values.min():17.4f}")

# %% mystnb={"image": {"alt": "Left: final loss against the peak rate. The constant one has the highest minimum and rises steeply beyond it; the decaying ones are lower and flatter. Right: loss against steps at each one's best peak; SGDR's restart raises it for a while, WSD falls in its last fifth."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))
for name, shape in SHAPES.items():
    left.loglog(PEAKS, ends[name], color=COLORS[name], label=name)
    right.semilogy(excess(shape, best[name]), color=COLORS[name])
left.set(xlabel="peak rate", ylabel="loss above the minimum, at the end", ylim=(None, 3))
right.set(xlabel="step", ylabel="loss above the minimum")
left.legend(fontsize="small")
plt.show()

# %% [markdown]
# Three things to see.
#
# - *A decay wins, and allows a higher peak.* The decaying schedules end near 0.05 where the best constant rate ends at 0.067, and at peaks up to three times as high. Whether the end is a tenth of the peak or zero hardly matters on this ravine; where the run is long enough for the noise to be all that is left, zero is better.
# - *It forgives.* To the right of its best rate the constant schedule pays in full: at a rate of 1 it ends at fifteen times its best loss, linear to zero at twice its own.
# - *A cooldown acts at once.* WSD is behind until step 800, and then catches up with schedules that have been decaying all along. A run judged on its plateau is judged by its noise: compare ends, not middles.
#
# That WSD comes out near the others although it decides late is its use: train at the plateau for as long as there is data, and branch off a decay wherever a finished model is wanted (`ravine.schedules.anneal_from`). SGDR pays for its restarts with short last stretches; it gives a usable model at the end of each cycle.
#
# ## 3. What is left of each update
#
# AdamW multiplies the weights by $1 - \eta_t \lambda$ at each step. Unrolled, the final weights are an exponential average of the updates made (signs and all), with the weight of update $i$
#
# $$c_i = \eta_i \lambda \prod_{j > i} (1 - \eta_j \lambda), \qquad \text{reaching back about } \frac{1}{\eta \lambda} \text{ steps.}$$
#
# `update_weights` computes them. With $\eta\lambda = 0.005$ at the peak, over a thousand steps:

# %% mystnb={"image": {"alt": "Weight of each past update in the final weights. Constant: an exponential that favours the last 200 updates. Cosine and linear to zero: a low hump over the middle of the run. WSD: growth up to step 800 and a steep end."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
for name in ("constant", "cosine to zero", "linear to zero", "WSD"):
    left_over = s.update_weights(SHAPES[name](0.05), 0.1, T)
    ax.plot(
        left_over.updates, color=COLORS[name], label=f"{name}; of the start {left_over.initial:.1%}"
    )
ax.set(xlabel="update i", ylabel=r"$c_i$")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# At a constant rate the model is the work of its last $1 / (\eta\lambda) = 200$ updates: the data before is forgotten, and the average over so few updates is noisy. A decaying rate spreads the weights over most of the run, which averages noise away: *a decay of the rate does the work of an average of the weights*, and the other way round (`ema`, `merge_weights`, Schedule-Free).
#
# The time scale $1 / (\eta \lambda)$ belongs to the run: it should be a fixed share of it, not a fixed number of steps. Train twice as long, and $\lambda$ wants to be half as large at the same rate (`scale_weight_decay`).
#
# ## 4. Decay as a second learning rate
#
# In classical statistics decay keeps weights small, against overfitting. Language models read their text about once and do not overfit; dropout, the other classical remedy, is switched off in most of them. Decay stays on, for another reason ([D'Angelo et al., 2023](https://arxiv.org/abs/2310.04415)).
#
# Weights that are followed by a norm have a direction that matters and a length that does not. Their gradient is orthogonal to them, so updates make them longer, step by step, and a longer vector is turned less by the same step. Decay makes it shorter. With updates of length $\eta \lVert u \rVert$,
#
# $$\lVert w_{t+1} \rVert^2 = (1 - \eta\lambda)^2\, \lVert w_t \rVert^2 + \eta^2 \lVert u \rVert^2,$$
#
# the two balance at
#
# $$\lVert w \rVert = \lVert u \rVert \sqrt{\frac{\eta}{2 \lambda}}, \qquad \text{angle per step} = \frac{\eta \lVert u \rVert}{\lVert w \rVert} = \sqrt{2 \eta \lambda}.$$
#
# **The effective learning rate is the angle, and it depends on the product $\eta\lambda$ alone.** With AdamW and gradients that are noise, orthogonal to the weights, four settings, two of which have the same product:

# %%
SIZE, STEPS = 512, 600 if SMOKE else 4000
SETTINGS = [(0.01, 0.1), (0.001, 1.0), (0.01, 0.4), (0.01, 0.0)]


@jax.jit
def equilibrium(rate, decay):
    """Length of the weights and angle of a step, at every step."""
    tx = ravine.adamw(rate, b1=0.0, b2=0.99, weight_decay=decay)

    def step(carry, key):
        w, state = carry
        g = jax.random.normal(key, (SIZE,))
        g = g - w * jnp.dot(g, w) / jnp.dot(w, w)  # a norm follows: no gradient along w
        updates, state = tx.update(g, state, w)
        new = optax.apply_updates(w, updates)
        cosine = jnp.dot(w, new) / jnp.linalg.norm(w) / jnp.linalg.norm(new)
        return (new, state), (jnp.linalg.norm(new), jnp.arccos(jnp.minimum(cosine, 1.0)))

    w = jax.random.normal(jax.random.key(1), (SIZE,)) * 0.05
    return jax.lax.scan(step, (w, tx.init(w)), jax.random.split(jax.random.key(0), STEPS))[1]


found = {pair: tuple(map(np.asarray, equilibrium(*map(jnp.float32, pair)))) for pair in SETTINGS}
print("rate    decay   angle per step   sqrt(2 rate decay)   length   predicted")
for (rate, decay), (lengths, angles) in found.items():
    length = np.sqrt(SIZE * rate / (2 * decay)) if decay else np.inf
    print(
        f"{rate:<7} {decay:<7} {angles[-50:].mean():14.4f} {np.sqrt(2 * rate * decay):20.4f} "
        f"{lengths[-1]:8.2f} {length:11.2f}"
    )

# %% mystnb={"image": {"alt": "Angle per step against steps, four settings. The two with the same product end at the same angle, the larger product at twice it; without decay the angle keeps falling."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
for (rate, decay), color in zip(found, ("#0072B2", "#56B4E9", "#D55E00", "#8A8A8A"), strict=True):
    label = rf"$\eta$ = {rate}, $\lambda$ = {decay}"
    ax.loglog(found[rate, decay][1], color=color, label=label, linewidth=1)
    if decay:
        ax.axhline(np.sqrt(2 * rate * decay), color=color, linewidth=0.8, linestyle=":")
ax.set(xlabel="step", ylabel="angle per step")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# The settings with the same product turn by the same angle, though their rates differ by ten; four times the decay doubles it. Without decay the weights grow as $\sqrt t$ and the angle falls: a schedule that nobody asked for. Decay holds the effective rate up, and the schedule of $\eta$ then brings it down when it is wanted.
#
# Two consequences. Under a schedule $\eta_t \to 0$ the angle goes down as $\sqrt{\eta_t}$ at first, and the length lags by $1/(\eta\lambda)$ steps. And $\lambda$ is not a small matter to be left at its default: where the rate is tuned, tune $\eta\lambda$ with it, as the sweep behind [the results](../docs/results.md) does.
#
# ## What to take along
#
# | | |
# |---|---|
# | warm-up | gets past first steps that rest on few gradients |
# | high plateau | progress in the shallow directions |
# | decay to zero | averages the noise away; forgives a peak that is too high |
# | WSD, `anneal_from` | where the length is open |
# | $1 / (\eta\lambda)$ | how far back AdamW's weights remember: a share of the run |
# | $\sqrt{2\eta\lambda}$ | the angle per step of weights that a norm follows: the effective rate |
#
# To try:
#
# 1. Set `SIGMA2 = 0.0` in section 2. Which schedule wins now, and why is that no argument for it?
# 2. Give WSD a cooldown of `decay_steps=20`, and of 600. How long has it to be?
# 3. In section 3 use `s.update_weights(s.constant(0.05), s.decay_to_none(0.1, T), T)`. What does it resemble?
# 4. In section 4 pass a schedule, `s.decay_to_zero(0.01, STEPS)`, for the rate. Does the angle follow $\sqrt{2 \eta_t \lambda}$ to the end?
