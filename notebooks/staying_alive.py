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
# # Staying alive
#
# The smallest model whose logits grow, a learning rate at which it diverges, and five devices each of which keeps it training at that rate.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine import stability

# %% [markdown]
# ## A head that looks something up
#
# One attention head. Its sixteen keys are made from random vectors $x_s$, its query from a noisy copy of one of them, and it has to say which:
#
# $$z_s = \frac{(W_q^\top \tilde x)^\top (W_k^\top x_s)}{\sqrt K}, \qquad \ell = \log \sum_s e^{z_s} - z_y .$$
#
# The logits are a product of two weight matrices, so the gradient of each is as large as the other: while the head learns, both grow, the curvature grows with them, and there comes a step that is too long for it. Then the loss rises, the gradient rises with the weights, and nothing stops it. One batch in fifty has inputs half as large again, which brings the moment forward.

# %%
WIDTH, KEYS, BATCH, STEPS, SEEDS = 16, 16, 32, 400, 8
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
    x, query, labels = batch
    q = (query @ params["query"])[:, None, None]  # [batch, time, heads, width]
    k = (x @ params["key"])[:, :, None]
    scale = None
    if qk_norm:
        (q, k), scale = stability.qk_norm(q, k), 1.0
    logits = stability.attention_logits(q, k, scale=scale)[:, 0, 0]
    parts = stability.cross_entropy(logits, labels, **options)
    return jnp.mean(parts.loss + parts.z_loss), jnp.mean(parts.loss)


def train(rate, guard=lambda tx: tx, qk_norm=False, **options):
    """The loss of every seed and step, without z-loss."""
    tx = optax.with_extra_args_support(guard(ravine.sgd(rate)))

    def step(carry, key):
        params, state = carry
        both = jax.value_and_grad(loss_of, has_aux=True)
        (total, loss), grads = both(params, draw(key), qk_norm, options)
        updates, state = tx.update(grads, state, params, loss=total)
        return (optax.apply_updates(params, updates), state), loss

    def one(key):
        start, data = jax.random.split(key)
        query, key = jax.random.normal(start, (2, WIDTH, WIDTH)) * WIDTH**-0.5
        params = {"query": query, "key": key}
        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(data, STEPS))[1]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS)))


# %% [markdown]
# ## The plain head
#
# At a rate of 0.5 it learns, for every one of eight seeds. At 2.5 it learns at first, too:

# %%
RATE = 2.5
runs = {"plain, rate 0.5": train(0.5), "plain": train(RATE)}


def show(ax, name, **style):
    low, middle, high = np.quantile(runs[name], [0, 0.5, 1], axis=0)
    (line,) = ax.plot(middle, label=name, **style)
    ax.fill_between(range(STEPS), low, high, alpha=0.15, color=line.get_color())


fig, ax = plt.subplots(figsize=(8.5, 3.4))
for name in runs:
    show(ax, name)
ax.axhline(np.log(KEYS), color="#888888", linewidth=0.8)
ax.set(yscale="log", xlabel="step", ylabel="loss, median and range of 8 seeds")
ax.legend()
plt.show()

# %% [markdown]
# The thin line is a guess at random, $\log 16 = 2.77$. The plain head ends far above it.
#
# ## Five devices, one at a time, at the same rate
#
# - **z-loss**, $c\,(\log \sum_s e^{z_s})^2$ with $c = 10^{-3}$: the logits stop growing, and so does the curvature.
# - **QK-norm**: the logits no longer depend on the size of the weights.
# - **Soft-cap** at 10: a logit far out has no gradient left.
# - **Skip-step**: a step whose loss or gradient norm is more than two deviations above the last ones is not made, and leaves no trace.
# - **Clipping** to a global norm of 1: no step is longer than the rate.

# %%
runs["z-loss"] = train(RATE, z_loss=1e-3)
runs["QK-norm"] = train(RATE, qk_norm=True)
runs["soft-cap"] = train(RATE, cap=10.0)

# %%
runs["skip-step"] = train(
    RATE, lambda tx: stability.skip_step(tx, warmup=16, window=64, deviations=2.0, patience=50)
)
runs["clipping"] = train(RATE, lambda tx: optax.chain(stability.clip_by_global_norm(1.0), tx))

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
for ax, names in zip(
    axes, [["z-loss", "QK-norm", "soft-cap"], ["skip-step", "clipping"]], strict=True
):
    show(ax, "plain", color="#bbbbbb")
    for name in names:
        show(ax, name)
    ax.set(yscale="log", ylim=(3e-3, 1e3), xlabel="step")
    ax.legend()
axes[0].set_ylabel("loss, median and range of 8 seeds")
plt.show()

print(f"{'':16} median of the last 50 steps: lowest and highest of the seeds")
for name, losses in runs.items():
    last = np.median(losses[:, -50:], axis=1)
    print(f"{name:16} {last.min():8.2f} {last.max():8.2f}")

# %% [markdown]
# The three that act on the logits remove the cause, QK-norm for good: the loss is the lowest of all, because its weights can grow without its logits. Clipping and skipping treat the symptom. They keep the run alive at a loss several times that of the lower rate, with the steps too long for what the head has become; a schedule that goes down would do the rest.
#
# What this does not show: which of them a large run needs. `docs/stability.md` says what there is, and `tests/test_devices_keep_training.py` holds these numbers to account.
