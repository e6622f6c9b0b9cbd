r"""Products that are known to be symmetric, computed at less than full cost.

:math:`XX^\top`, and the product of two polynomials of one symmetric matrix, equal their transposes, so
the blocks below the diagonal need not be multiplied out. Halving the matrix once computes three of
four blocks; halving the diagonal blocks again, ten of sixteen: the cost falls from 1 to 3/4, 5/8, ...
towards 1/2. XLA has no such product of its own, and the pieces are plain matrix products on every
device. The result is exactly symmetric, which a full product is not.
"""

import jax
import jax.numpy as jnp

SMALLEST_BLOCK = 1024
"""Blocks are not halved below this size. On CPU, halving products of 512 rows to blocks of 128 saved
at most 8 % of an update and tripled its compile time; the gain grows with the size."""


def halvings(size: int, smallest_block: int = SMALLEST_BLOCK, most: int = 2) -> int:
    """How often a symmetric matrix of `size` rows is halved.

    Example:
      >>> from ravine.optimizers.matrix.symmetric import halvings
      >>> [halvings(n) for n in (512, 2047, 2048, 4096, 8192)]
      [0, 0, 1, 2, 2]
    """
    count = 0
    while count < most and size >= 2 * smallest_block:
        size, count = size // 2, count + 1
    return count


def cost_share(depth: int) -> float:
    """Multiplications of a product halved `depth` times, relative to a full one.

    Example:
      >>> from ravine.optimizers.matrix.symmetric import cost_share
      >>> [cost_share(depth) for depth in range(4)]
      [1.0, 0.75, 0.625, 0.5625]
    """
    return 0.5 + 0.5 ** (depth + 1)


def symmetric_product(
    left_KxMxN: jax.Array, right_KxNxM: jax.Array, depth: int, *, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """`left @ right`, where the caller knows the result to be symmetric.

    Args:
      left_KxMxN: a batch of matrices.
      right_KxNxM: another, such that every product equals its transpose.
      depth: halvings, see `halvings`.
      precision: of the products; they accumulate, and the result comes, in float32 at least.

    Returns:
      `[K, M, M]`, exactly symmetric if `depth` > 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.optimizers.matrix.symmetric import symmetric_product
      >>> x = jnp.arange(6.0).reshape(1, 2, 3)
      >>> symmetric_product(x, x.swapaxes(1, 2), 1, precision="highest")
      Array([[[ 5., 14.],
              [14., 50.]]], dtype=float32)
    """
    if depth == 0:
        return product(left_KxMxN, right_KxNxM, precision=precision)
    half = left_KxMxN.shape[1] // 2
    first, second = left_KxMxN[:, :half], left_KxMxN[:, half:]
    left, right = right_KxNxM[:, :, :half], right_KxNxM[:, :, half:]
    corner = symmetric_product(first, left, depth - 1, precision=precision)
    off = product(first, right, precision=precision)
    opposite = symmetric_product(second, right, depth - 1, precision=precision)
    above = jnp.concatenate([corner, off], axis=2)
    below = jnp.concatenate([jnp.swapaxes(off, 1, 2), opposite], axis=2)
    return jnp.concatenate([above, below], axis=1)


def product(left: jax.Array, right: jax.Array, *, precision: jax.lax.PrecisionLike) -> jax.Array:
    """A batched matrix product that accumulates in float32 at least."""
    wide = jnp.float64 if left.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(left, right, precision=precision, preferred_element_type=wide)
