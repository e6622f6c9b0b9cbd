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
# # Training as stochastic optimization
#
# A language model is trained by minimizing a sum over a text with steps that each look at a small part of it. This lesson takes that sentence apart: what the sum is, what it stands for, what the small part gets right on average, how far off it is in a single step, and why that is still the faster way.
#
# The text is one that fits on a page, so that every sum can be computed exactly and compared with its samples.

# %%
import codecs
import contextlib
import io
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import ravine
from ravine.training.colours import PICTURES

with contextlib.redirect_stdout(io.StringIO()):
    import this  # prints itself when imported

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
TEXT = codecs.decode(this.s, "rot13").lower()
LETTERS = sorted(set(TEXT))
tokens = np.array([LETTERS.index(letter) for letter in TEXT])
print(TEXT[:96])
print(f"{len(TEXT)} characters, {len(LETTERS)} different ones")

# %% [markdown]
# ## 1. From likelihood to a sum
#
# A model gives a probability to a text by giving one to every token after those before it:
#
# $$p_\theta(x_1, \dots, x_n) = \prod_{i=1}^{n} p_\theta(x_i \mid x_1, \dots, x_{i-1}).$$
#
# Training looks for the $\theta$ under which the text we have is most probable. A product of thousands of numbers below one is zero in floating point, so one takes the logarithm, and by convention the negative mean of it:
#
# $$F(\theta) = \frac1N \sum_{i=1}^{N} f_i(\theta), \qquad f_i(\theta) = -\log p_\theta(x_i \mid x_{<i}).$$
#
# That is the *next-token loss*, in nats per token. A model that knows nothing gives every token the same probability and has $F = \log V$ for $V$ tokens; $e^F$, the perplexity, is the number of tokens it hesitates between.
#
# Our model sees eight characters and predicts the ninth: an embedding, one hidden layer, logits. The last fifth of the text is kept for later.

# %%
CONTEXT, WIDTH, HIDDEN = 8, 12, 96
windows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)
N = int(0.8 * len(windows))
train_set, held_out = jnp.asarray(windows[:N]), jnp.asarray(windows[N + CONTEXT :])
V = len(LETTERS)


def init(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embedding": jax.random.normal(keys[0], (V, WIDTH)),
        "hidden": jax.random.normal(keys[1], (CONTEXT * WIDTH, HIDDEN)) / np.sqrt(CONTEXT * WIDTH),
        "head": 0.1 * jax.random.normal(keys[2], (HIDDEN, V)) / np.sqrt(HIDDEN),
    }


def losses(params, batch):
    """f_i for every window of a batch."""
    x = params["embedding"][batch[:, :-1]].reshape(len(batch), -1)
    logits = jnp.tanh(x @ params["hidden"]) @ params["head"]
    return ravine.stability.cross_entropy(logits, batch[:, -1]).loss


loss = lambda params, batch: jnp.mean(losses(params, batch))
params = init(0)
print(f"N = {N} windows to train on, {len(held_out)} held out")
print(f"F at the start {loss(params, train_set):.3f}, log V {np.log(V):.3f}")

# %% [markdown]
# ## 2. A finite sum, and what it stands for
#
# Two functions go by the name of "the loss", and it pays to keep them apart:
#
# - the **finite sum** $F(\theta) = \frac1N \sum_i f_i(\theta)$ over the text we have. It can be computed, and a large model can bring it close to zero by learning the text by heart;
# - the **expectation** $\mathbb{E}_x[f_x(\theta)]$ over all text of the kind. It is what we want, and nobody can compute it. Text that was not trained on gives an estimate.
#
# Large runs read every token once or a few times. Each batch is then nearly a fresh sample of the expectation, and the difference hardly matters. On a page of text read hundreds of times it is all that matters:

# %%
STEPS = 300 if SMOKE else 1500
BATCH = 32


def train(tx, steps, batch, seed=0, every=25):
    """Losses on both sets every so many steps, with windows drawn at random; the full set for batch=N."""
    params = init(0)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, N) if batch < N else jnp.arange(N)
        grads = jax.grad(loss)(params, train_set[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def block(carry, keys):
        both = loss(carry[0], train_set), loss(carry[0], held_out)
        return jax.lax.scan(step, carry, keys)[0], both

    keys = jax.random.split(jax.random.key(seed), (steps // every, every))
    return jax.jit(lambda: jax.lax.scan(block, (params, tx.init(params)), keys)[1])()


by_heart, unseen = train(ravine.adamw(3e-3), STEPS, BATCH)

# %% mystnb={"image": {"alt": "Loss against steps. On the text trained on it falls towards zero; on held-out text it falls at first and then rises far above its start."}}
fig, ax = plt.subplots(figsize=(7, 3))
at = 25 * np.arange(len(by_heart))
ax.plot(at, by_heart, color="#0072B2", label="finite sum (trained on)")
ax.plot(at, unseen, color="#D55E00", label="estimate of the expectation (held out)")
ax.axhline(np.log(V), color="#888888", linewidth=0.8)
ax.set(xlabel="step", ylabel="nats per character")
ax.legend()
plt.show()

# %% [markdown]
# The finite sum goes to almost nothing, and the estimate of the expectation turns around within the first hundred steps: from there on the model learns this page, and no longer English. The rest of the lesson asks only how fast the finite sum falls, which is the optimizer's part.
#
# ## 3. A batch is right on average
#
# Draw $B$ indices at random and take the gradient of their mean:
#
# $$g = \frac1B \sum_{b=1}^{B} \nabla f_{i_b}(\theta), \qquad \mathbb{E}[g] = \nabla F(\theta).$$
#
# It is unbiased, whatever $B$. How large is the *mini-batch noise* in it? Let $\Sigma$ be the covariance of the gradients of single windows. For independent draws
#
# $$\mathbb{E}\,\lVert g - \nabla F \rVert^2 = \frac{\operatorname{tr} \Sigma}{B},$$
#
# and for draws without replacement, as in an epoch through a shuffled text, it is smaller by $(N - B)/(N - 1)$, and zero once the batch is everything. Nothing in either depends on the number of parameters or on $N$ by itself: **a batch of 64 is as good on a page as on the internet.** Both, measured against the exact gradient:

# %%
flat = lambda tree: jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])
each = jax.jit(jax.vmap(lambda window: flat(jax.grad(loss)(params, window[None]))))(train_set)
full = each.mean(0)
scatter = float(jnp.sum(jnp.var(each, axis=0)))  # tr Sigma
signal = float(jnp.sum(full**2))

SIZES = [1, 4, 16, 64, 256, N]
DRAWS = 50 if SMOKE else 400
rng = np.random.default_rng(0)


def error(size, replace):
    """Mean squared distance of a batch's gradient from the full one."""
    found = [
        np.sum((np.asarray(each)[rng.choice(N, size, replace=replace)].mean(0) - full) ** 2)
        for _ in range(DRAWS)
    ]
    return float(np.mean(found))


print(f"|grad F|^2 = {signal:.3f}, tr Sigma = {scatter:.3f}, ratio {scatter / signal:.0f}")
print("\n   B   with replacement   tr Sigma / B   without    x (N - B) / (N - 1)")
for size in SIZES:
    without, share = error(size, False), (N - size) / (N - 1)
    print(
        f"{size:4} {error(size, True):18.4f} {scatter / size:14.4f} {without:9.4f} "
        f"{scatter / size * share:22.4f}"
    )

# %% [markdown]
# The ratio $\operatorname{tr}\Sigma / |\nabla F|^2$ is the batch at which noise and signal are of the same size: the *gradient noise scale*, the subject of the lesson on batch size. Here, at the start, it is about two hundred windows. It grows as training goes on: the signal dies out, the scatter does not.
#
# ## 4. Why noise wins
#
# The exact gradient costs $N$ evaluations, and a batch of 32 a twentieth of that. Below, the same SGD and the same learning rate, once with every window at every step, once with 32. On the left against steps, on the right against what they cost.

# %%
RATE = 0.5
EPOCHS = 40 if SMOKE else 200
PER_EPOCH = N // BATCH
few = train(ravine.sgd(RATE), EPOCHS * PER_EPOCH, BATCH, every=PER_EPOCH)[0]
whole = train(ravine.sgd(RATE), EPOCHS, N, every=1)[0]
long_whole = train(ravine.sgd(RATE), EPOCHS * PER_EPOCH, N, every=PER_EPOCH)[0]

# %% mystnb={"image": {"alt": "Two plots of the training loss. Against steps the full batch and batches of 32 fall alike; against windows read, batches of 32 fall far faster."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
at_steps = PER_EPOCH * np.arange(EPOCHS)
left.plot(at_steps, long_whole, color="#D55E00", label=f"all {N} windows")
left.plot(at_steps, few, color="#0072B2", label=f"{BATCH} windows")
left.set(xlabel="steps", ylabel="F, nats per character", yscale="log")
right.plot(range(EPOCHS), whole, color="#D55E00")
right.plot(range(EPOCHS), few, color="#0072B2")
right.set(xlabel="passes through the text")
left.legend()
plt.show()
print(f"after {EPOCHS - 1} passes: full batch {whole[-1]:.3f}, batches of {BATCH} {few[-1]:.3f}")

# %% [markdown]
# Step for step, the exact gradient is a little better, as it should be. Per window read, it is hopeless: it makes one step where the other makes twenty. As long as the noise does not dominate, the extra accuracy of a large batch is not worth its price.
#
# ## 5. What the noise costs
#
# Near the minimum the signal fades and the noise remains. At a constant learning rate $\eta$ the parameters then jitter around the minimum. For a quadratic of curvature $h$ and gradient noise of variance $\sigma^2 / B$ the recurrence $\theta \leftarrow \theta - \eta (h \theta + \xi)$ has the stationary excess loss
#
# $$\tfrac12 h\, \mathbb{E}[\theta^2] = \frac{\eta\, \sigma^2 / B}{2 (2 - \eta h)} \approx \frac{\eta\, \sigma^2}{4 B},$$
#
# in proportion to $\eta / B$. Half the rate and twice the batch do the same to it; a rate that goes to zero removes it. That is what the decay of a schedule is for:

# %%
H, SIGMA = 1.0, 1.0
PARALLEL, LENGTH = 4000, 400


def excess(schedule, batch):
    """Mean excess loss over many runs on the quadratic, at every step, from a start at 3."""
    tx = ravine.sgd(schedule)

    def step(carry, key):
        theta, state = carry
        noise = SIGMA / np.sqrt(batch) * jax.random.normal(key, theta.shape)
        updates, state = tx.update(H * theta + noise, state, theta)
        return (optax.apply_updates(theta, updates), state), 0.5 * H * jnp.mean(theta**2)

    start = 3.0 * jnp.ones(PARALLEL)
    keys = jax.random.split(jax.random.key(1), LENGTH)
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), keys)[1])()


runs = {
    r"$\eta$ = 0.1, B = 1": (0.1, 1, "#D55E00"),
    r"$\eta$ = 0.1, B = 4": (0.1, 4, "#E69F00"),
    r"$\eta$ = 0.025, B = 1": (0.025, 1, "#009E73"),
    r"$\eta$ from 0.1 to 0, B = 1": (ravine.schedules.decay_to_zero(0.1, LENGTH), 1, "#0072B2"),
}

# %% mystnb={"image": {"alt": "Excess loss against steps. Constant rates level off at the predicted heights, equal for a quarter of the rate and four times the batch; the decaying rate goes below all of them."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
for name, (rate, batch, color) in runs.items():
    ax.semilogy(excess(rate, batch), color=color, label=name)
    if isinstance(rate, float):
        level = rate * SIGMA**2 / batch / (2 * (2 - rate * H))
        ax.axhline(level, color=color, linewidth=0.8, linestyle=":")
ax.set(xlabel="step", ylabel="excess loss", ylim=(1e-3, 6))
ax.legend()
plt.show()

# %% [markdown]
# The dotted lines are the formula. A quarter of the rate and four times the batch end at the same level; the small rate takes four times as many steps to get there, the large batch four times as many samples. The decaying rate starts as fast as the fastest and ends below all of them, for no extra cost. Section 4 with `ravine.schedules.cosine` in place of the constant rate shows the same on the text.
#
# ## What to take along
#
# | | |
# |---|---|
# | the loss | a mean of $-\log p$ over tokens, a finite sum that stands for an expectation |
# | a batch | unbiased; squared error $\operatorname{tr}\Sigma / B$, whatever the size of the text |
# | why small batches | for the price of one exact gradient one gets $N / B$ noisy steps |
# | what noise costs | a floor in proportion to $\eta / B$, which a decaying rate removes |
# | what the optimizer cannot fix | the gap between finite sum and expectation: that takes more text |
#
# To try:
#
# 1. Set `BATCH = 4` in section 4. Where does the advantage per window end? Halve `RATE` then.
# 2. Replace `ravine.sgd(RATE)` by `ravine.adamw(3e-3)`. Does the comparison of the two batch sizes change?
# 3. Measure $\operatorname{tr}\Sigma / |\nabla F|^2$ again after 20 passes, with the trained parameters.
# 4. In section 5 give `excess` a schedule that is constant for three quarters of the run (`ravine.schedules.wsd`). Does it matter when the decay starts?
