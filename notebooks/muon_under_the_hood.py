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
# # Muon under the hood
#
# Muon is momentum, and then one operation: the momentum matrix is replaced by the orthogonal matrix nearest to it. This lesson shows why that is a sensible step, how it is computed by matrix products alone, what the odd coefficients in every implementation are, why half the products can be spared, and how long the resulting step should be.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import ravine
from ravine.training.colours import PICTURES

plt.rcParams.update(PICTURES)
COLORS = {
    "classic cubic": "#8A8A8A",
    "keller": "#0072B2",
    "quintic": "#E69F00",
    "polar_express": "#009E73",
}

# %% [markdown]
# ## 1. The steepest step, measured by what it does
#
# Every optimizer answers one question: of all steps of a given length, which lowers the loss most? The answer depends on what *length* means. For a gradient $G = U S V^\top$ and a step $D$ one minimizes $\langle G, D \rangle$:
#
# | length of $D$ | steepest step | optimizer |
# |---|---|---|
# | root of the sum of squares | $-G / \lVert G \rVert$ | SGD |
# | largest element | $-\operatorname{sign}(G)$ | Lion, and Adam nearly |
# | largest singular value | $-U V^\top$ | Muon |
#
# A weight matrix is not a list of numbers: it multiplies activations. Its largest singular value bounds what a step can change in them, whatever they are, so the third length is the one that says what a step *does*. $U V^\top$ is the **polar factor** of $G$: the same directions, all singular values one. What that means for a gradient whose singular values fall off:

# %%
M, N = 96, 256
rng = np.random.default_rng(0)
turn = lambda n: np.linalg.qr(rng.normal(size=(n, n)))[0]
S = np.geomspace(1.0, 3e-3, M)
U, V = turn(M), turn(N)[:, :M]
G = U * S @ V.T
polar = U @ V.T
steps = {"SGD": G, "sign": np.sign(G), "Muon": polar}
print("share of a step's squared length in the ten strongest directions of 96")
for name, step in steps.items():
    inside = np.sum((U.T @ step @ V)[:10] ** 2)
    print(f"  {name:5} {inside / np.sum(step**2):.0%}")

# %% [markdown]
# SGD spends itself on the few strong directions, Muon treats all alike. Directions that are rare in the data but real get their full share; so does noise, which is why Muon needs momentum in front of it, to average noise away before it is blown up.
#
# ## 2. Without a singular value decomposition
#
# An SVD is slow and awkward on accelerators, which multiply matrices. Take an odd polynomial of a matrix,
#
# $$X \leftarrow a X + b\, (X X^\top) X + c\, (X X^\top)^2 X.$$
#
# With $X = U \Sigma V^\top$ every term is $U (\cdot) V^\top$, so the step maps each singular value by itself, $\sigma \mapsto a\sigma + b\sigma^3 + c\sigma^5$, and leaves the directions alone. If it drives all of $(0, 1]$ to 1, iterating gives the polar factor. That is **Newton–Schulz**; dividing $X$ by its Frobenius norm first puts its singular values into $(0, 1]$.
#
# The classic is the cubic with $a = \frac32$, $b = -\frac12$. It converges to machine precision, and takes its time: a small $\sigma$ grows by a factor 1.5 per step. Keller Jordan's observation was that nobody needs precision. Any value near one will do, so choose $a$ as large as possible, 3.4445, and let the singular values scatter around one:

# %%
SETS = {
    "classic cubic": [(1.5, -0.5, 0.0)] * 5,
    **{
        name: ravine.NewtonSchulz(name, steps=5).table()
        for name in ("keller", "quintic", "polar_express")
    },
}


def mapped(table, sigma):
    """What the steps make of singular values."""
    for a, b, c in table:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


# %% mystnb={"image": {"alt": "Singular value after five steps against the one before. The classic cubic reaches one only above 0.2; Keller's set scatters between 0.7 and 1.2 from 0.002 on; the tuned quintic stays close to one from 0.007 on; Polar Express reaches furthest down."}}
sigma = np.geomspace(1e-4, 1, 2000)
fig, ax = plt.subplots(figsize=(7, 3.4))
for name, table in SETS.items():
    ax.semilogx(sigma, mapped(table, sigma), color=COLORS[name], label=name)
ax.axhline(1.0, color="#222222", linewidth=0.8, linestyle=":")
ax.set(xlabel="singular value before", ylabel="after five steps")
ax.legend()
plt.show()
print(f"{'':14} first a   smallest that ends above 0.5   range from 0.01 to 1")
for name, table in SETS.items():
    after = mapped(table, sigma)
    reach = sigma[np.argmax(after > 0.5)]
    inside = after[sigma >= 0.01]
    print(f"{name:14} {table[0][0]:7.3f} {reach:30.4f}   {inside.min():8.2f} to {inside.max():.2f}")

# %% [markdown]
# *Keller's* set uses the same three numbers in each step. The *quintic* set tunes each step by itself. *Polar Express* takes the best polynomial for the interval in which the singular values are by then, from a given smallest one on (`lower=`), so that it converges as fast as any quintics can.
#
# A set of coefficients can also be wrong: cut short or repeated, some published tables map the strongest direction to a *negative* number, and the step goes uphill there. `ravine.NewtonSchulz` refuses those when it is built:

# %%
try:
    ravine.NewtonSchulz(coefficients=((3.4445, -4.7750, 0.5), (3.4445, -4.7750, 0.5)))
except ValueError as error:
    print(error)

# %% [markdown]
# ## 3. The iteration at work
#
# All 96 singular values of the matrix of section 1, step by step, under Keller's coefficients:

# %% mystnb={"image": {"alt": "Traces of 96 singular values over five steps: spread over two and a half decades at first, the large ones gather near one after two steps, the small ones catch up by step five."}}
X = G / np.linalg.norm(G)
traces = [np.linalg.svd(X, compute_uv=False)]
for a, b, c in SETS["keller"]:
    gram = X @ X.T
    X = a * X + (b * gram + c * gram @ gram) @ X
    traces.append(np.linalg.svd(X, compute_uv=False))
fig, ax = plt.subplots(figsize=(7, 3.2))
for index, values in enumerate(traces):
    jitter = np.linspace(-0.25, 0.25, M)
    ax.semilogy(index + jitter, values, ".", color=COLORS["keller"], markersize=3)
ax.axhspan(0.7, 1.2, color="#8A8A8A", alpha=0.2)
ax.set(xlabel="step", ylabel="singular values")
plt.show()
found = np.asarray(ravine.NewtonSchulz()(jnp.asarray(G, jnp.float32)[None])[0])
print(f"ravine.NewtonSchulz against this loop: {np.abs(found - X).max():.1e}")
print(
    f"cosine with the exact polar factor: {np.sum(found * polar) / np.linalg.norm(found) / np.sqrt(M):.3f}"
)

# %% [markdown]
# ## 4. The Gram form
#
# A step costs three products: $X X^\top$, its square, and one with $X$. For a wide matrix, $m \times n$ with $m < n$, the first and last cost $2 m^2 n$ operations each, and only the second is small. But all steps have the form $X_k = Q_k X_0$ with small $Q_k$, and $Q_k$ can be found from $R = X_0 X_0^\top$ alone:
#
# $$P = a I + b R + c R^2, \qquad Q \leftarrow P Q, \qquad R \leftarrow P R P^\top.$$
#
# One long product at the start, one at the end, and small ones in between. The price is rounding: $R$ squares the condition number, which is why the iteration is restarted once from the matrix itself, and why the form is not used in bfloat16.


# %%
def operations(m, n, count=5, restarts=1):
    """Multiplications and additions of both forms, in units of 1e9."""
    standard = count * (4 * m * m * n + 2 * m**3)
    gram = (1 + restarts) * 4 * m * m * n + count * 4 * 2 * m**3
    return standard / 1e9, gram / 1e9


print("matrix        standard    Gram, one restart")
for m, n in ((512, 512), (512, 2048), (4096, 11008)):
    standard, gram = operations(m, n)
    print(f"{m:5} x {n:<6} {standard:8.1f} {gram:12.1f}   GFLOP, ratio {gram / standard:.2f}")

batch = jnp.asarray(G, jnp.float32)[None]
reference = np.asarray(ravine.NewtonSchulz(form="standard")(batch))
print("\nrelative distance from the standard form in float32")
for label, options in {
    "Gram, restart before step 3": {"form": "gram"},
    "Gram, no restart": {"form": "gram", "restarts": ()},
    "standard, bfloat16": {"form": "standard", "dtype": "bfloat16"},
}.items():
    other = np.asarray(ravine.NewtonSchulz(**options)(batch))
    print(f"  {label:28} {np.linalg.norm(other - reference) / np.linalg.norm(reference):.0e}")

# %% [markdown]
# The count is that of plain products; Ravine's Gram form spares some of the small ones, too. `form="auto"` takes the cheaper. On a mesh the Gram form has another use: where the long side is cut over devices, only $m \times m$ sums are exchanged.
#
# ## 5. How long a step
#
# The polar factor of an $m \times n$ matrix has $\min(m, n)$ singular values of one, and so elements with a root mean square of $1 / \sqrt{\max(m, n)}$: the larger the matrix, the smaller its elements' steps. Two conventions correct for that:
#
# - `scale="keller"`, $\sqrt{\max(1, \text{out} / \text{in})}$: the change of the activations stays the same, and learning rates are Muon's own, about 0.02;
# - `scale="moonlight"`, $0.2 \sqrt{\max(\text{in}, \text{out})}$: elements move by 0.2 of the rate whatever the shape, as they do under AdamW, so that AdamW's rates and decay fit.

# %%
print("shape (in, out)    root mean square of the update")
print("                   none     keller   moonlight")
for shape in ((256, 256), (256, 1024), (1024, 256)):
    g = jax.random.normal(jax.random.key(0), shape)
    row = []
    for scale in ("none", "keller", "moonlight"):
        tx = ravine.scale_by_muon(scale=scale)
        update, _ = tx.update(g, tx.init(g))
        row.append(float(jnp.sqrt(jnp.mean(update**2))))
    print(f"{shape!s:18} {row[0]:.4f}   {row[1]:.4f}   {row[2]:.4f}")

# %% [markdown]
# ## What to take along
#
# | piece | what it is for |
# |---|---|
# | polar factor | the steepest step when length is the change of activations: all directions alike |
# | momentum in front | averages noise before every direction is blown up to one |
# | Newton–Schulz | the polar factor by products alone; singular values near one are good enough |
# | coefficients | how far down small singular values are still reached, in how many products |
# | Gram form | short products instead of long ones; short sums on a mesh |
# | scale | the learning rate's unit: Muon's own or AdamW's |
#
# Only matrices have a polar factor worth having. Embeddings, heads, norms and biases go to AdamW, by role ([the guide](../docs/roles.md)); and [Inside Shampoo](inside_shampoo.ipynb) shows that Shampoo without its memory takes the very same step.
#
# To try:
#
# 1. Set the smallest singular value of section 1 to `1e-4`. Which set still reaches it?
# 2. Section 2 with `ravine.NewtonSchulz("polar_express", steps=8).table()`. How much of the interval is flat?
# 3. Add noise to `G` in section 1, as large as its tenth singular value. What share of Muon's step is noise?
# 4. Give section 3 the table of the quintic set. After which step are all values above 0.5?
