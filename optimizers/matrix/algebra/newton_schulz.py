r"""Newton–Schulz iterations on batches of matrices, and the products in them.

For :math:`G = U \Sigma V^\top` the polar factor is :math:`U V^\top`: every singular value becomes one.
A step :math:`X \leftarrow aX + b\,XX^\top X + c\,(XX^\top)^2 X` maps each singular value by an odd
polynomial and needs matrix products only. There are two forms of the same arithmetic:

*standard*
    three products per step, two of them with the long side;
*gram*
    the steps act on :math:`R = XX^\top` alone, collecting :math:`Q` with :math:`X_k = Q X_0`; only the
    first and the last product have the long side. Squaring the singular values loses the small ones to
    rounding, so after some steps the iteration *restarts*: :math:`X \leftarrow QX`,
    :math:`R \leftarrow XX^\top`.

:math:`XX^\top`, and the product of two polynomials of one symmetric matrix, equal their transposes, so
the part below the diagonal need not be computed twice. The upper half of the rows is one product; in
the lower half only the diagonal block remains, which can be halved again: the cost falls from 1 to 3/4,
11/16, ... towards 2/3. XLA has no such product of its own; these pieces are plain matrix products on
every device, long in two of their three sides. Counted at their reduced cost, the shape decides which
form multiplies less; `cheapest` computes it.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..mesh.exchange import largest
from ..mesh.placement import Names
from .coefficients import Steps

Form = Literal["standard", "gram"]
SMALLEST_STRIP = 2**19
"""Rows times inner size of a strip worth a separate product. On CPU, one halving saves a sixth for 512
rows with inner size 2048, but nothing with inner size 512, where it would cost compile time."""


def normalize(matrices_KxMxN: jax.Array, summed: Names = ()) -> jax.Array:
    """Each matrix divided by its Frobenius norm, at any scale; a zero matrix stays zero.

    The largest element is divided out first, so that squares neither overflow nor vanish. Nothing is
    added to the norm, since that would shrink small matrices.
    """
    here = jnp.max(jnp.abs(matrices_KxMxN), axis=(1, 2), keepdims=True, initial=0)
    maximum = largest(here, summed)
    scaled = matrices_KxMxN / jnp.where(maximum == 0, 1, maximum)
    squares = jax.lax.psum(jnp.sum(jnp.square(scaled), axis=(1, 2), keepdims=True), summed)
    # Not after the root, whose slope at zero is infinite: derivatives would be NaN.
    return scaled / jnp.sqrt(jnp.where(squares == 0, 1, squares))


def iterated(
    matrices_KxMxN: jax.Array,
    steps: Steps,
    form: Form,
    products: Any,
    *,
    restarts: tuple[int, ...] = (),
    summed: Names = (),
) -> jax.Array:
    """The steps on normalized matrices, by these products: `Whole` or `Halves`."""
    x = products.cut(normalize(matrices_KxMxN, summed).astype(products.dtype))
    x = _gram(x, steps, products, restarts) if form == "gram" else _standard(x, steps, products)
    return products.joined(x)


def _standard(x: Any, steps: Steps, products: Any) -> Any:
    """The steps in standard form, on `x` as the products cut it."""
    for a, b, c in steps:
        gram = products.gram(x)
        inner = jax.tree.map(lambda r, b=b: b * r, gram)
        if c:
            square = products.symmetric(gram, gram)
            inner = jax.tree.map(lambda p, s, c=c: p + c * s, inner, square)
        x = jax.tree.map(
            lambda x, y, a=a: (a * x.astype(y.dtype) + y).astype(products.dtype),
            x,
            products.full(inner, x),
        )
        # Otherwise XLA for TPU keeps the wide products of all steps, to add them up in one kernel at
        # the end.
        x = jax.lax.optimization_barrier(x)
    return x


def _gram(x: Any, steps: Steps, products: Any, restarts: tuple[int, ...]) -> Any:
    """The steps in Gram form, on `x` as the products cut it."""
    start = r = products.gram(x)
    eye, q = products.identity(r), None
    for index, (a, b, c) in enumerate(steps):
        p = jax.tree.map(lambda eye, r, a=a, b=b: a * eye + b * r, eye, r)
        if c:
            p = jax.tree.map(lambda p, s, c=c: p + c * s, p, products.symmetric(r, r))
        q = p if q is None else products.symmetric(p, q)
        if index + 1 == len(steps):
            break
        if index + 1 in restarts:
            x = jax.tree.map(lambda y: y.astype(products.dtype), products.full(q, x))
            start, q = products.gram(x), None
            r = start
        else:
            # Not P R P: with rounding, Q and R would drift apart. This way R is the Gram matrix of the
            # current QX, as in the standard form, and the error is two to four times smaller.
            r = products.congruent(q, start)
    assert q is not None
    return products.full(q, x)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Products with inputs rounded to one dtype, and wide results; `Halves` has the same of halves."""

    dtype: Any
    depth: int | None
    precision: Any
    summed: Names

    def cut(self, x: jax.Array) -> jax.Array:
        """The form of matrices `[K, M, N]` that the iterations work on."""
        return x

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        return x

    def identity(self, like: jax.Array) -> jax.Array:
        """The identity, which broadcasts to `like`."""
        return jnp.eye(like.shape[1], dtype=like.dtype)[None]

    def gram(self, x: jax.Array) -> jax.Array:
        """:math:`XX^\\top`, all columns included."""
        return jax.lax.psum(self.symmetric(x, jnp.swapaxes(x, 1, 2)), self.summed)

    def symmetric(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """A product known to be symmetric."""
        left, right = left.astype(self.dtype), right.astype(self.dtype)
        return symmetric_product(left, right, self.depth, precision=self.precision)

    def full(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Any other product."""
        return product(left.astype(self.dtype), right.astype(self.dtype), precision=self.precision)

    def congruent(self, q: jax.Array, r: jax.Array) -> jax.Array:
        """:math:`Q R Q^\\top`, in this order."""
        return self.symmetric(self.full(q, r), jnp.swapaxes(q, 1, 2))


def symmetric_product(
    left_KxMxN: jax.Array,
    right_KxNxM: jax.Array,
    depth: int | None = None,
    *,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    """`left @ right`, for results known to be symmetric.

    Args:
      left_KxMxN: a batch of matrices.
      right_KxNxM: another batch, such that every product equals its transpose.
      depth: number of halvings; ``None`` takes `halvings` for the shape.
      precision: precision of the products; accumulation and result are in float32 at least.

    Returns:
      `[K, M, M]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.newton_schulz import symmetric_product
      >>> x = jnp.arange(6.0).reshape(1, 2, 3)
      >>> symmetric_product(x, x.swapaxes(1, 2), 1, precision="highest")
      Array([[[ 5., 14.],
              [14., 50.]]], dtype=float32)
    """
    rows = left_KxMxN.shape[1]
    if depth is None:
        depth = halvings(rows, left_KxMxN.shape[2])
    half = rows // 2
    if depth == 0 or half == 0:
        return product(left_KxMxN, right_KxNxM, precision=precision)
    upper = product(left_KxMxN[:, :half], right_KxNxM, precision=precision)
    corner = symmetric_product(
        left_KxMxN[:, half:], right_KxNxM[:, :, half:], depth - 1, precision=precision
    )
    return completed(upper, corner)


def completed(upper: jax.Array, corner: jax.Array) -> jax.Array:
    """Symmetric matrices `[..., M, M]`, from their first rows and the block below on the diagonal."""
    half = upper.shape[-2]
    lower = jnp.concatenate([jnp.swapaxes(upper[..., half:], -1, -2), corner], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def product(left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """A batched matrix product that accumulates in float32 at least."""
    wide = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(left, right, precision=precision, preferred_element_type=wide)


@functools.cache
def halvings(rows: int, inner: int, most: int = 2) -> int:
    """How often a symmetric product `[rows, inner] @ [inner, rows]` is halved.

    Example:
      >>> from ravine.optimizers.matrix.algebra.newton_schulz import halvings
      >>> [halvings(*sides) for sides in ((512, 512), (512, 2048), (1024, 1024), (4096, 4096))]
      [0, 1, 1, 2]
    """
    count = 0
    while count < most and rows // 2 * inner >= SMALLEST_STRIP:
        rows, count = rows // 2, count + 1
    return count


def cost_share(depth: int) -> float:
    """Multiplications of a product halved `depth` times, relative to a full one.

    Example:
      >>> from ravine.optimizers.matrix.algebra.newton_schulz import cost_share
      >>> [cost_share(depth) for depth in range(3)]
      [1.0, 0.75, 0.6875]
    """
    return 2 / 3 + 0.25**depth / 3


def multiplications(
    form: str,
    rows: int,
    columns: int,
    steps: Steps,
    restarts: tuple[int, ...] = (),
    depth: int | None = None,
) -> float:
    """Multiply-adds for one `[rows, columns]` matrix, rows <= columns.

    Example:
      >>> from ravine.optimizers.matrix.algebra.coefficients import named_coefficients
      >>> from ravine.optimizers.matrix.algebra.newton_schulz import multiplications
      >>> steps = named_coefficients("keller", 5)
      >>> [multiplications(form, 1, 4, steps) for form in ("standard", "gram")]
      [45.0, 25.0]
    """

    def symmetric(inner: int) -> float:
        share = cost_share(halvings(rows, inner) if depth is None else depth)
        return share * rows**2 * inner

    count, squares = len(steps), sum(c != 0 for _, _, c in steps)
    small, gram, apply = symmetric(rows), symmetric(columns), float(rows**2 * columns)
    if form == "standard":
        return count * (gram + apply) + squares * small
    starts = [0, *sorted(step for step in set(restarts) if step < count)]
    ends = [*starts[1:], count]
    collects = sum(end - start - 1 for start, end in zip(starts, ends, strict=True))
    # A step squares R and multiplies into Q; all but the last before an end also move R on: Q R Q.
    return len(starts) * (gram + apply) + (squares + 2 * collects) * small + collects * rows**3


def cheapest(
    rows: int, columns: int, steps: Steps, restarts: tuple[int, ...] = (), depth: int | None = None
) -> Form:
    """The form that multiplies less."""
    costs = {
        form: multiplications(form, rows, columns, steps, restarts, depth)
        for form in ("standard", "gram")
    }
    return "gram" if costs["gram"] < costs["standard"] else "standard"
