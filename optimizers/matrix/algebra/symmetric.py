r"""Products that are known to be symmetric, computed at less than full cost.

:math:`XX^\top`, and the product of two polynomials of one symmetric matrix, equal their transposes, so
the part below the diagonal need not be computed twice. The upper half of the rows is one product; in
the lower half only the diagonal block remains, which can be halved again: the cost falls from 1 to 3/4,
11/16, ... towards 2/3. XLA has no such product of its own; these pieces are plain matrix products on
every device, long in two of their three sides.
"""

import jax
import jax.numpy as jnp

SMALLEST_STRIP = 2**19
"""Rows times inner size of a strip worth a separate product. On CPU, one halving saves a sixth for 512
rows with inner size 2048, but nothing with inner size 512, where it would cost compile time."""


def halvings(rows: int, inner: int, most: int = 2) -> int:
    """How often a symmetric product `[rows, inner] @ [inner, rows]` is halved.

    Example:
      >>> from ravine.optimizers.matrix.algebra.symmetric import halvings
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
      >>> from ravine.optimizers.matrix.algebra.symmetric import cost_share
      >>> [cost_share(depth) for depth in range(3)]
      [1.0, 0.75, 0.6875]
    """
    return 2 / 3 + 0.25**depth / 3


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
      >>> from ravine.optimizers.matrix.algebra.symmetric import symmetric_product
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
    lower = jnp.concatenate([jnp.swapaxes(upper[:, :, half:], 1, 2), corner], axis=2)
    return jnp.concatenate([upper, lower], axis=1)


def product(left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """A batched matrix product that accumulates in float32 at least."""
    wide = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(left, right, precision=precision, preferred_element_type=wide)
