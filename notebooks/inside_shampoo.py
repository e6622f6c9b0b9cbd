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
# # Inside Shampoo
#
# [Down the ravine](down_the_ravine.ipynb) ended with a defect: a rate for each coordinate helps only while the ravine lies along the axes. Turn it, and Adam's ratio sees the same mixture of wall and floor in every coordinate. Shampoo keeps matrices instead, which see the turn. This lesson opens it: what the matrices are, why two small ones can stand in for one that is far too large, what their roots do to a gradient, and what had to be added before it trained anything: a ridge, blocks, a graft. Muon and SOAP turn out to be close relatives.

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
from ravine.training.colours import PICTURES, colour

with contextlib.redirect_stdout(io.StringIO()):
    import this  # the text of section 2

SMOKE = os.environ.get("RAVINE_SMOKE") == "1"
plt.rcParams.update(PICTURES)
COLORS = {name: colour(name) for name in ("adam", "shampoo", "soap", "muon")}
EVERY = ravine.Refresh(every=1)

# %% [markdown]
# ## 1. The turned ravine
#
# Adam divides by the root of $v = \operatorname{mean}(g^2)$, element by element: the diagonal of $\operatorname{mean}(g g^\top)$. With the whole matrix in the place of its diagonal,
#
# $$A_t = \beta_2 A_{t-1} + (1 - \beta_2)\, g_t g_t^\top, \qquad u_t = A_t^{-1/2} m_t,$$
#
# a turn of the surface turns $g$, $A$ and $u$ alike: the path is the same, seen from another side. For a vector that is exactly what `scale_by_shampoo` computes. Both optimizers down the ravine with $h = (1, 100)$, along the axes and turned by 45°:

# %%
TURN = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
CURVATURES = {"along the axes": np.diag([1.0, 100.0])}
CURVATURES["turned by 45°"] = TURN @ CURVATURES["along the axes"] @ TURN.T
BEGIN = {"along the axes": np.array([2.0, 1.0]), "turned by 45°": TURN @ np.array([2.0, 1.0])}


def descend(direction, hessian, start, rate, steps=60):
    """The points visited."""
    tx = optax.chain(direction, ravine.scale_by_learning_rate(rate))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(hessian @ params, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = jnp.asarray(start, jnp.float32)
    run = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=steps)[1])
    return np.concatenate([start[None], run()])


whole = ravine.scale_by_shampoo(b2=0.99, refresh=EVERY, graft=ravine.Grafting(step="none"))
paths = {
    (name, surface): descend(direction, jnp.asarray(h, jnp.float32), BEGIN[surface], 0.1)
    for name, direction in (("adam", ravine.scale_by_adam(0.9, 0.99)), ("shampoo", whole))
    for surface, h in CURVATURES.items()
}

# %% mystnb={"image": {"alt": "Paths down two ravines. Along the axes Adam and Shampoo both go to the minimum; turned by 45 degrees Shampoo's path is the same turned, Adam's is another, longer one."}}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharex=True, sharey=True)
x, y = np.meshgrid(np.linspace(-1, 2.6, 200), np.linspace(-1.2, 2.6, 200))
for ax, (surface, h) in zip(axes, CURVATURES.items(), strict=True):
    f = 0.5 * (h[0, 0] * x**2 + 2 * h[0, 1] * x * y + h[1, 1] * y**2)
    ax.contour(x, y, f, np.logspace(-2, 2.5, 10), colors="#c3c8cf", linewidths=0.6)
    for name in ("adam", "shampoo"):
        ax.plot(*paths[name, surface].T, ".-", color=COLORS[name], label=name, markersize=4)
    ax.plot(0, 0, "*", color="#222222", markersize=10)
    ax.set(title=surface, aspect="equal")
axes[0].legend()
plt.show()
turned_back = paths["shampoo", "turned by 45°"] @ TURN
print(
    f"shampoo, turned back: {np.abs(turned_back - paths['shampoo', 'along the axes']).max():.1e} apart"
)
print("adam, turned back:    ", end="")
print(
    f"{np.abs(paths['adam', 'turned by 45°'] @ TURN - paths['adam', 'along the axes']).max():.1e}"
)

# %% [markdown]
# ## 2. Two small matrices for one large one
#
# A weight matrix of $m \times n$ has a gradient of $mn$ elements, and $A$ would have $(mn)^2$: for $4096 \times 4096$ that is $10^{15}$ bytes. But such a gradient has a form. In a layer $y = W^\top x$ every sample contributes $G = x\, \delta^\top$, input times error. If inputs and errors were independent, the covariance of $G$ would be the Kronecker product of theirs. Shampoo takes that form for granted and keeps
#
# $$L = \mathbb{E}[G G^\top] \ (m \times m), \qquad R = \mathbb{E}[G^\top G] \ (n \times n), \qquad \mathbb{E}[\operatorname{vec} G \operatorname{vec} G^\top] \approx \frac{L \otimes R}{\operatorname{tr} L}.$$
#
# How good is that for a real gradient? A small language model (one hidden layer, on a page of text, briefly trained), and a part of its hidden matrix that is small enough to write down all of $A$:

# %%
TEXT = codecs.decode(this.s, "rot13").lower()
LETTERS = sorted(set(TEXT))
CONTEXT, WIDTH, HIDDEN = 8, 12, 24
tokens = np.array([LETTERS.index(letter) for letter in TEXT])
windows = jnp.asarray(np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1))


def init(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embedding": jax.random.normal(keys[0], (len(LETTERS), WIDTH)),
        "hidden": {"kernel": jax.random.normal(keys[1], (CONTEXT * WIDTH, HIDDEN)) * 0.1},
        "head": {"kernel": jax.random.normal(keys[2], (HIDDEN, len(LETTERS))) * 0.02},
    }


def loss(params, batch):
    x = params["embedding"][batch[:, :-1]].reshape(len(batch), -1)
    logits = jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
    return jnp.mean(ravine.stability.cross_entropy(logits, batch[:, -1]).loss)


def trained(tx, steps, batch=64):
    """Parameters after a short training, and the losses."""
    params = init()

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(windows))
        value, grads = jax.value_and_grad(loss)(params, windows[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), values = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()
    return params, values


model, _ = trained(ravine.adamw(3e-3), 100)
each = jax.jit(jax.vmap(lambda window: jax.grad(loss)(model, window[None])["hidden"]["kernel"]))(
    windows
)  # [samples, in, out]
part = np.asarray(each[:, -WIDTH:, :10], np.float64)  # the last character's rows, ten columns
flat = part.reshape(len(part), -1)
A = flat.T @ flat / len(part)
L = np.einsum("sij,skj->ik", part, part) / len(part)
R = np.einsum("sij,sik->jk", part, part) / len(part)
kronecker = np.kron(L, R) / np.trace(L)
off = lambda guess: np.linalg.norm(A - guess) / np.linalg.norm(A)
print(f"A has {A.size:,} elements, L and R together {L.size + R.size}, the diagonal {len(A)}")
print(
    f"distance from A, relative: Kronecker {off(kronecker):.2f}, diagonal {off(np.diag(np.diag(A))):.2f}"
)

# %% mystnb={"image": {"alt": "Three heat maps: the full covariance, its Kronecker approximation, which has the same blocks and stripes, and its diagonal, which has none of them."}}
fig, axes = plt.subplots(1, 3, figsize=(8.5, 3))
top = np.quantile(np.abs(A), 0.99)
for ax, (title, matrix) in zip(
    axes,
    {"A": A, "L ⊗ R / tr L": kronecker, "diagonal (Adam)": np.diag(np.diag(A))}.items(),
    strict=True,
):
    ax.imshow(matrix, cmap="RdBu", vmin=-top, vmax=top, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Not exact, since errors do depend on inputs, but with the blocks and stripes of the original, which the diagonal lacks; for a sixtieth of the numbers.
#
# ## 3. What the roots do
#
# With the Kronecker form a root is the product of roots, $(L \otimes R)^{-1/4} \operatorname{vec} G = \operatorname{vec}(L^{-1/4} G R^{-1/4})$. Why a quarter? Take a single gradient $G = U S V^\top$. Then $L = U S^2 U^\top$ and $R = V S^2 V^\top$, and
#
# $$L^{-1/4}\, G\, R^{-1/4} = U S^{-1/2}\, S\, S^{-1/2}\, V^\top = U V^\top:$$
#
# **the polar factor of the gradient, all singular values one. Without its memory Shampoo is Muon**, which finds the same factor by a few matrix products instead of two eigendecompositions. With memory the singular values are divided by what they usually are. The spectra, for the whole hidden matrix:

# %%
gradient = jnp.mean(each[:64], axis=0)
memory = jnp.asarray(each)[: 64 * (len(each) // 64)].reshape(-1, 64, *gradient.shape).mean(1)


def shampoo_of(gradients, **options):
    """The direction after these gradients, without momentum, graft and schedule."""
    tx = ravine.scale_by_shampoo(
        0.0,
        1.0,
        refresh=EVERY,
        graft=ravine.Grafting(step="none"),
        blocks=ravine.Blocks(size=None),
        **options,
    )
    state, update = tx.init(gradients[0]), jax.jit(tx.update)
    for g in gradients:
        direction, state = update(g, state)
    return direction, state


singular = lambda matrix: np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
spectra = {
    "the gradient": singular(gradient),
    "Shampoo, this gradient only": singular(shampoo_of([gradient])[0]),
    f"Shampoo, after {len(memory)} gradients": singular(shampoo_of([*memory, gradient])[0]),
    "polar factor (Muon)": singular(
        ravine.NewtonSchulz("polar_express", steps=8)(gradient[None])[0]
    ),
}

# %% mystnb={"image": {"alt": "Singular values by rank. The gradient's fall by more than a decade; Shampoo's with one gradient are flat, like the polar factor's; with memory they fall by a factor of five."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
for (name, values), color in zip(
    spectra.items(), ("#8A8A8A", "#56B4E9", COLORS["shampoo"], COLORS["muon"]), strict=True
):
    style = "--" if "Muon" in name else ".-"
    ax.semilogy(values / values[0], style, color=color, label=name)
ax.set(xlabel="rank", ylabel="singular value, relative to the largest")
ax.legend()
plt.show()

# %% [markdown]
# A step along the raw gradient is a step along its few largest directions. After the roots all directions move, the rare ones too.
#
# ## 4. The ridge, and a certificate
#
# Statistics of few gradients are singular: one gradient of $96 \times 24$ has a rank of 24 at most, and $L$ has 96 dimensions. $0^{-1/4}$ is infinite, and in float32 the small eigenvalues of a matrix with a large one are not even known: they are rounding errors. So a multiple of the largest eigenvalue is added first, $L + \rho\, \lambda_{\max} I$. How large has $\rho$ to be? Ravine computes the residual $\max |A X^p - I|$ of every root it finds, and keeps the one before where it is above a tolerance of 0.1:

# %%
print("   ridge   residual of the rows' root   refused")
for ridge in (1e-9, 1e-7, 1e-5, 1e-3):
    _, state = shampoo_of([gradient], roots=ravine.Roots(ridge=ridge))
    rows = state.factors[0][0]
    print(f"{ridge:8.0e} {float(rows.residual.max()):22.2g} {int(rows.refused.sum()):12}")

# %% [markdown]
# 1e-5 is Ravine's default. A refused root costs nothing but time: the last good one goes on working. `ravine.root_failures(state)` says where that happens, and [Taming Shampoo](../docs/taming_shampoo.md) has the measurements.
#
# ## 5. Blocks
#
# A factor of $n$ rows takes $n^2$ memory and $n^3$ arithmetic, so long axes are cut. What that does to the state of one $512 \times 2048$ matrix:

# %%
params = {"up": {"kernel": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}}
print("blocks     bytes per parameter   what is kept")
for size in (64, 128, 512, None):
    tx = ravine.shampoo(1e-3, blocks=ravine.Blocks(size=size))
    row = ravine.explain(tx, params).rows[0]
    print(f"{size!s:10} {row.state_bytes / (512 * 2048):19.1f}   {row.how}")

# %% [markdown]
# Cut into squares, the bytes are the same whatever the size (two factors of $b^2$ for $b^2$ elements), and the arithmetic falls with it. Uncut, the long side alone costs four times the matrix, twice. Blocks also decide what a mesh has to send: none at all where shards do not cut them.
#
# ## 6. The graft
#
# The *direction* is good; its length means little. It depends on the exponent, on how many gradients the statistics hold, on the ridge. The cure is blunt: take the length of another optimizer's step, block by block. Adam's, by default, so that Adam's learning rates fit. The length of the update of the hidden matrix, over the first steps:

# %%
COUNT = len(memory)
lengths = {}
for name, direction in {
    "Shampoo without graft": ravine.scale_by_shampoo(
        refresh=EVERY, graft=ravine.Grafting(step="none")
    ),
    "Shampoo, grafted": ravine.scale_by_shampoo(refresh=EVERY),
    "Adam": ravine.scale_by_adam(0.9, 0.99),
}.items():
    state, update, lengths[name] = direction.init(gradient), jax.jit(direction.update), []
    for g in memory:
        updates, state = update(g, state)
        lengths[name].append(float(jnp.linalg.norm(updates)))
print("step " + "".join(f"{name:>24}" for name in lengths))
for at in (0, 1, 3, COUNT - 1):
    print(f"{at + 1:4} " + "".join(f"{values[at]:24.2f}" for values in lengths.values()))

# %% [markdown]
# Grafted, it is Adam's length by construction.
#
# ## 7. SOAP: Adam in Shampoo's basis
#
# Shampoo uses eigenvectors *and* eigenvalues of $L$ and $R$. SOAP keeps only the vectors: it turns the gradient, $G' = Q_L^\top G\, Q_R$, runs Adam on $G'$, and turns the step back. In that basis the ravine lies along the axes, and a rate for each coordinate is the right thing again. The second moment of the hidden matrix, as it is and turned:

# %%
_, QL = np.linalg.eigh(np.einsum("sij,skj->ik", each, each))
_, QR = np.linalg.eigh(np.einsum("sij,sik->jk", each, each))
moment = np.mean(np.asarray(each) ** 2, axis=0)
turned = np.mean((QL.T @ np.asarray(each) @ QR) ** 2, axis=0)[::-1, ::-1]

# %% mystnb={"image": {"alt": "Two heat maps of second moments on a logarithmic scale. As it is, most elements are within a decade of each other; in the eigenbasis they fall over four decades from one corner."}}
fig, axes = plt.subplots(1, 2, figsize=(7.5, 4), sharey=True)
for ax, (title, v) in zip(
    axes, {"as it is": moment, "in the eigenbasis": turned}.items(), strict=True
):
    image = ax.imshow(np.log10(v / v.max()), cmap="viridis", vmin=-6, vmax=0, aspect="auto")
    ax.set(title=title, xlabel="columns")
axes[0].set_ylabel("rows")
fig.colorbar(image, ax=axes, label="log10 of the second moment, relative")
plt.show()
for title, v in {"as it is": moment, "in the eigenbasis": turned}.items():
    share = np.sort(v.ravel())[::-1][: v.size // 100].sum() / v.sum()
    print(f"{title:18} 1 % of the elements hold {share:.0%} of the second moment")

# %% [markdown]
# As it is, there is little for Adam's ratio to even out: each coordinate is a mixture of everything. Turned, steep and shallow directions are apart.
#
# ## 8. All of them, down one ravine of matrices
#
# $F(W) = \frac12 \lVert A^{1/2} W B^{1/2} \rVert^2$ with $A$ and $B$ turned at random and a thousandfold spread of curvatures each, so that the whole has a condition number of a million. Each optimizer at the best of a few rates, under a schedule that ends at zero:

# %%
SIZE, STEPS = 16, 60 if SMOKE else 200
RATES = np.geomspace(0.05, 3.2, 2 if SMOKE else 9)
rng = np.random.default_rng(0)
basis = lambda: np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
spread = lambda: (q := basis()) @ np.diag(np.geomspace(1e-3, 1, SIZE)) @ q.T
LEFT, RIGHT = (jnp.asarray(spread(), jnp.float32) for _ in range(2))
W0 = jnp.asarray(rng.normal(size=(SIZE, SIZE)), jnp.float32)
value_of = lambda w: 0.5 * jnp.sum(w * (LEFT @ w @ RIGHT))
DIRECTIONS = {
    "adam": ravine.scale_by_adam(0.9, 0.99),
    "muon": ravine.scale_by_muon(0.9, scale="moonlight"),
    "shampoo": ravine.scale_by_shampoo(0.9, 0.99, refresh=ravine.Refresh(every=5)),
    "soap": ravine.scale_by_soap(0.9, 0.99, refresh=ravine.Refresh(every=5)),
}


def race(direction):
    """Losses at the best of the rates, and that rate."""

    @jax.jit
    def run(rate):
        schedule = lambda count: rate * (1 - count / STEPS)
        tx = optax.chain(direction, optax.scale_by_learning_rate(schedule))

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(LEFT @ w @ RIGHT, state, w)
            return (optax.apply_updates(w, updates), state), value_of(w)

        return jax.lax.scan(step, (W0, tx.init(W0)), length=STEPS)[1]

    runs = [np.asarray(run(jnp.float32(rate))) for rate in RATES]
    best = int(np.argmin([values[-1] for values in runs]))
    return runs[best], RATES[best]


# %% mystnb={"image": {"alt": "Loss against steps on a logarithmic scale for Adam, Muon, Shampoo and SOAP, each at its best rate."}}
fig, ax = plt.subplots(figsize=(7, 3.2))
for name, direction in DIRECTIONS.items():
    values, rate = race(direction)
    ax.semilogy(values, color=COLORS[name], label=f"{name}, {rate:.2g}")
    print(f"{name:8} rate {rate:.3f}: loss {values[0]:.2f} to {values[-1]:.1e}")
ax.set(xlabel="step", ylabel="F")
ax.legend()
plt.show()

# %% [markdown]
# One exact quadratic without noise is the best case for methods with matrices. What they gain on text is in [the results](../docs/results.md): less, and bought with memory and time.
#
# ## What to take along
#
# | piece | what it is for |
# |---|---|
# | $L$, $R$ | the covariance of a matrix's gradient, in $m^2 + n^2$ numbers instead of $(mn)^2$ |
# | $L^{-1/4} G R^{-1/4}$ | all directions move; for a single gradient the polar factor, Muon's step |
# | ridge and certificate | statistics are singular, and float32 does not know small eigenvalues |
# | blocks | bounded memory and arithmetic; nothing to send on a mesh |
# | graft | a length that learning rates are known for |
# | SOAP | only the basis; Adam does the rest |
#
# To try:
#
# 1. Section 3 with `roots=ravine.Roots(exponent=-0.5)`. What happens to the spectrum, and why does a graft become necessary?
# 2. Section 2 at initialization, without training. Is the Kronecker form better or worse?
# 3. Section 8 with `refresh=ravine.Refresh(every=50)`. Who suffers more, Shampoo or SOAP?
# 4. Section 8 with gradients that have noise in them. Who gains from the averages?
