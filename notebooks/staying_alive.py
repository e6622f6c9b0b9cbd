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
# # Staying alive
#
# Large runs fail in three ways: a number overflows, logits grow until a step is too long, or one bad batch poisons everything after it. This lesson shows each on the smallest example that has it, and what stops it:
#
# | section | failure | remedy |
# |---|---|---|
# | 1. softmax in numbers | $e^z$ overflows, $\log 0$ | subtract the maximum; float32 |
# | 2. and 3. logits that grow | training diverges at a rate that worked at first | z-loss, soft-cap, QK-norm; clipping, skipping |
# | 4. one bad batch | NaN for ever after | a guard |

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine import stability
from ravine.training.colours import PICTURES

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
COLORS = {
    "plain, rate 0.5": "#56B4E9",
    "plain": "#8A8A8A",
    "z-loss": "#E69F00",
    "QK-norm": "#0072B2",
    "soft-cap": "#009E73",
    "skip-step": "#D55E00",
    "clipping": "#CC79A7",
}

# %% [markdown]
# ## 1. Softmax in numbers
#
# A softmax is written as
#
# $$p_v = \frac{e^{z_v}}{\sum_u e^{z_u}}.$$
#
# Computed as written, it overflows: float32 ends at $3.4 \cdot 10^{38}$, which is $e^{88.7}$, and float16 at 65504, which is $e^{11.1}$. One logit of 89 makes $\infty / \infty$. Nothing changes if a constant is subtracted from all logits, so subtract the largest:
#
# $$p_v = \frac{e^{z_v - m}}{\sum_u e^{z_u - m}}, \qquad \log \sum_u e^{z_u} = m + \log \sum_u e^{z_u - m}, \qquad m = \max_u z_u.$$
#
# Every exponent is now at most zero, and one of them is zero, so the sum is at least one.

# %%
as_written = lambda z: jnp.exp(z) / jnp.sum(jnp.exp(z))
print("logits            float16 as written    float32 as written    safe_softmax")
for z in ([10.0, 9.0], [12.0, 11.0], [89.0, 88.0], [1e4, 9999.0]):
    row = [as_written(jnp.array(z, dtype)) for dtype in (jnp.float16, jnp.float32)]
    row.append(stability.safe_softmax(jnp.array(z)))
    print(f"{z!s:18}" + "".join(f"{np.round(np.asarray(p, np.float32), 3)!s:22}" for p in row))

# %% [markdown]
# The loss has a second trap. A probability below $10^{-45}$ is zero, and its logarithm is $-\infty$; the loss itself is an ordinary number, if one never forms the probability: $\ell = \log \sum_u e^{z_u} - z_y$. And a third: bfloat16 has eight significant bits, so that near 100 neighbouring numbers are half a unit apart, and a factor of $e^{0.2}$ between two probabilities disappears.

# %%
z, wrong = jnp.array([0.0, 200.0]), jnp.array(0)
print(
    "loss of a sure mistake: ",
    -jnp.log(stability.safe_softmax(z)[0]),
    "by the probability,",
    end=" ",
)
print(stability.cross_entropy(z, wrong).loss, "by the log-normaliser")
close = jnp.array([100.0, 100.2])
print("two logits 0.2 apart:   ", stability.safe_softmax(close), "in float32,", end=" ")
print(stability.safe_softmax(close.astype(jnp.bfloat16)), "rounded to bfloat16 first")

# %% [markdown]
# So logits are kept in float32 up to the loss (`stability.cross_entropy` takes them there), and overflow is a solved problem. What remains is that logits grow.
#
# ## 2. A head that looks something up
#
# One attention head. Its sixteen keys are made from random vectors $x_s$, its query from a noisy copy of one of them, and it has to say which:
#
# $$z_s = \frac{(W_q^\top \tilde x)^\top (W_k^\top x_s)}{\sqrt K}, \qquad \ell = \log \sum_s e^{z_s} - z_y .$$
#
# The logits are a product of two weight matrices, so the gradient of each is in proportion to the other: while the head learns, both grow, the curvature grows with them, and there comes a step that is too long for it. Then the loss rises, the gradient rises with the weights, and nothing stops it. One batch in fifty has inputs half as large again, which brings the moment forward.

# %%
WIDTH, KEYS, BATCH = 16, 16, 32
STEPS, SEEDS = (120, 3) if SMOKE else (400, 8)
RARE, FACTOR = 0.02, 1.5


def draw(key):
    """Keys, queries and labels of one batch."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (BATCH, KEYS, WIDTH))
    labels = jax.random.randint(keys[1], (BATCH,), 0, KEYS)
    picked = jnp.take_along_axis(x, labels[:, None, None], axis=1)[:, 0]
    noise = 0.5 * jax.random.normal(keys[2], (BATCH, WIDTH))
    factor = jnp.where(jax.random.uniform(keys[3]) < RARE, FACTOR, 1.0)
    return factor * x, factor * (picked + noise), labels


def loss_of(params, batch, qk_norm, options):
    """What is minimized; and the loss without z-loss, and the largest logit."""
    x, query, labels = batch
    q = (query @ params["query"])[:, None, None]  # [batch, time, heads, width]
    k = (x @ params["key"])[:, :, None]
    scale = None
    if qk_norm:
        (q, k), scale = stability.qk_norm(q, k), 1.0
    logits = stability.attention_logits(q, k, scale=scale)[:, 0, 0]
    parts = stability.cross_entropy(logits, labels, **options)
    shown = jnp.mean(parts.loss), jnp.max(jnp.abs(logits))
    return jnp.mean(parts.loss + parts.z_loss), shown


def train(rate, guard=lambda tx: tx, qk_norm=False, bad=None, **options):
    """Loss and largest logit of every seed and step; the batch of step `bad` has a NaN."""
    tx = optax.with_extra_args_support(guard(ravine.sgd(rate)))

    def step(carry, at):
        (params, state), (count, key) = carry, at
        x, query, labels = draw(key)
        if bad is not None:
            x = jnp.where(count == bad, jnp.nan, x)
        both = jax.value_and_grad(loss_of, has_aux=True)
        (total, shown), grads = both(params, (x, query, labels), qk_norm, options)
        updates, state = tx.update(grads, state, params, loss=total)
        return (optax.apply_updates(params, updates), state), shown

    def one(key):
        start, data = jax.random.split(key)
        query, key = jax.random.normal(start, (2, WIDTH, WIDTH)) * WIDTH**-0.5
        params = {"query": query, "key": key}
        steps = jnp.arange(STEPS), jax.random.split(data, STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), steps)[1]

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS))
    return tuple(map(np.asarray, found))


# %% [markdown]
# At a rate of 0.5 it learns, for every seed. At 2.5 it learns at first, too:

# %%
RATE = 2.5
runs = {"plain, rate 0.5": train(0.5), "plain": train(RATE)}


def show(ax, name, what):
    """Median and range over seeds of the loss (0) or the largest logit (1)."""
    low, middle, high = np.nanquantile(runs[name][what], [0, 0.5, 1], axis=0)
    ax.plot(middle, label=name, color=COLORS[name])
    ax.fill_between(range(STEPS), low, high, alpha=0.15, color=COLORS[name])


# %% mystnb={"image": {"alt": "Two plots against steps for rates 0.5 and 2.5. Loss: the low rate falls steadily, the high one falls first and then rises to hundreds. Largest logit: the high rate's grows to thousands."}}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.2))
for what, ax in enumerate(axes):
    for name in runs:
        show(ax, name, what)
    ax.set(yscale="log", xlabel="step", ylabel=("loss", "largest logit")[what])
axes[0].axhline(np.log(KEYS), color="#222222", linewidth=0.8, linestyle=":")
axes[0].legend()
plt.show()

# %% [markdown]
# Lines are medians, bands the range of the seeds; the dotted line is a guess at random, $\log 16 = 2.77$. The logits tell the story before the loss does: at the low rate they level off in the tens, at the high one they never stop. That is why `ravine.stability.with_monitors` and the trainer's `--monitor-every` record the largest logit.
#
# ## 3. Five devices, at the same rate
#
# Three act on the logits:
#
# - **z-loss** adds $c\, n^2$ with $n = \log \sum_s e^{z_s}$, here $c = 10^{-3}$. Its gradient, $2 c\, n\, p_s$, pushes down on the likely logits, harder the larger they are all together. (PaLM: $c = 10^{-4}$.)
# - **Soft-cap**, $z \leftarrow \hat c \tanh(z / \hat c)$ with $\hat c = 10$: the identity near zero, and far out the derivative $1 - \tanh^2(z / \hat c)$ is zero, so that nothing pushes a logit any further. (Gemma 2: 50 in the attention, 30 at the end.)
# - **QK-norm** divides queries and keys by their root mean square, $q \leftarrow q \,/ \sqrt{\operatorname{mean} q^2 + \epsilon}$, and the keys likewise. Then $|z| \le K$ whatever the size of the weights, and the gradient is orthogonal to them: weights can grow without the logits.
#
# Two act on the step:
#
# - **Clipping** scales a gradient down to a norm of 1, so that no step is longer than the rate.
# - **Skip-step** makes no step at all where the loss or the gradient's norm is more than two deviations above the last ones.

# %%
runs["z-loss"] = train(RATE, z_loss=1e-3)
runs["QK-norm"] = train(RATE, qk_norm=True)
runs["soft-cap"] = train(RATE, cap=10.0)

# %%
runs["skip-step"] = train(
    RATE, lambda tx: stability.skip_step(tx, warmup=16, window=64, deviations=2.0, patience=50)
)
runs["clipping"] = train(RATE, lambda tx: optax.chain(stability.clip_by_global_norm(1.0), tx))

# %% mystnb={"image": {"alt": "Four plots against steps. Devices on the logits: losses stay low, QK-norm's lowest, and the largest logits level off near 20. Devices on the step: losses stay near one, logits grow more slowly."}}
GROUPS = [["z-loss", "QK-norm", "soft-cap"], ["skip-step", "clipping"]]
fig, axes = plt.subplots(2, 2, figsize=(8.5, 5.6), sharex=True, sharey="row")
for column, names in zip(axes.T, GROUPS, strict=True):
    for what, ax in enumerate(column):
        for name in ["plain", *names]:
            show(ax, name, what)
        ax.set(yscale="log", ylim=((3e-3, 1e3), (1, 3e4))[what])
    column[0].legend(ncols=2, fontsize="small")
    column[1].set_xlabel("step")
axes[0, 0].set(ylabel="loss", title="on the logits")
axes[0, 1].set(title="on the step")
axes[1, 0].set_ylabel("largest logit, before the cap")
plt.show()

print(f"{'':16} median of the last 50 steps: lowest and highest of the seeds")
for name, (losses, logits) in runs.items():
    last, size = np.median(losses[:, -50:], axis=1), np.median(logits[:, -50:])
    print(f"{name:16} {last.min():8.2f} {last.max():8.2f}    largest logit {size:8.0f}")

# %% [markdown]
# The three that act on the logits remove the cause. QK-norm does it for good: its loss is the lowest of all. Clipping and skipping treat the symptom: they keep the run alive, at a loss several times that of the lower rate, with steps that are still too long for what the head has become; a schedule that goes down would do the rest.
#
# There is a sixth, `stability.qk_clip`, for runs that must not change the model: after a step it scales down the query and key weights of just those heads whose largest logit has passed a threshold (Kimi K2).
#
# ## 4. One bad batch
#
# A single NaN in a batch makes the whole gradient NaN, then the momentum, then the weights. Nothing afterwards can repair that. Clipping does not help: NaN divided by a norm of NaN is NaN. A **guard** looks at loss and gradient and makes no step at all if they are not finite; parameters and the optimizer's state stay what they were, to the bit. In step 60 every key is NaN:

# %%
BAD = 60
guards = {
    "none": lambda tx: tx,
    "clip_by_global_norm": lambda tx: optax.chain(stability.clip_by_global_norm(1.0), tx),
    "finite_gate": stability.finite_gate,
}
print(f"{'guard':22} loss before   at the bad step   after   at the end")
for name, guard in guards.items():
    losses = train(0.5, guard, bad=BAD)[0][0]
    print(
        f"{name:22} {losses[BAD - 1]:11.2f} {losses[BAD]:17.2f} {losses[BAD + 1]:7.2f} "
        f"{losses[-1]:12.2f}"
    )

# %% [markdown]
# `skip_step` does what `finite_gate` does, and skips spikes besides. Both have counts of skipped steps in their state: look at `in_a_row`, since a guard that skips every step keeps a run alive that has long been dead.
#
# ## What to take along
#
# | what you see | what to do | in `ravine.stability` |
# |---|---|---|
# | NaN or infinity in the loss with large logits | float32 logits, safe softmax | `cross_entropy`, `safe_softmax` |
# | attention logits grow for thousands of steps | QK-norm in a new model, QK-clip in an old one | `qk_norm`, `qk_clip` |
# | output logits drift | z-loss | `cross_entropy(z_loss=1e-4)` |
# | loss spikes and comes back | clipping, skip-step | `clip_by_global_norm`, `skip_step` |
# | loss spikes and stays | return to a snapshot, leave the data out | `ravine.training.rollback` |
# | single bad batches | a guard | `finite_gate` |
#
# What this does not show: which of them a large run needs. [The guide](../docs/stability.md) says what there is, and `tests/test_devices_keep_training.py` holds the numbers of section 3 to account.
#
# To try:
#
# 1. Set the z-loss to $10^{-5}$ and to $10^{-1}$. What does each do to the loss?
# 2. Give the plain head at 2.5 a schedule, `ravine.schedules.decay_to_zero(2.5, STEPS)`. Does it survive?
# 3. Replace `ravine.sgd` by `ravine.adamw` at 0.03. Does it still need a device?
# 4. In section 4 set `FACTOR = 30.0` instead of the NaN. Which guard helps now?
