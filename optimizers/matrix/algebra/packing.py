"""Symmetric matrices in half the memory.

The rectangular full packed format of LAPACK: a symmetric n x n matrix, n even, as `[n + 1, n / 2]`. The
columns of the left half hold the part below the diagonal, moved down by one row; the free triangle
holds the lower triangle of the right half, transposed. This takes slices and selects only, no gather.
The result is stored as two long rows: a TPU pads rows to 128 elements, and n / 2 may be smaller.
"""

import math

import jax
import jax.numpy as jnp


def packed_shape(n: int) -> tuple[int, int]:
    """The shape of a packed n x n matrix; odd matrices are padded by one row and column.

    Example:
      >>> from ravine.optimizers.matrix.algebra.packing import packed_shape
      >>> packed_shape(4), packed_shape(5), packed_shape(512)
      ((2, 5), (2, 11), (2, 65664))
    """
    even = n + n % 2
    size = (even + 1) * even // 2
    return 2, -(-size // 2)


def pack(symmetric: jax.Array) -> jax.Array:
    """`[..., n, n]` to `[..., *packed_shape(n)]`; only the lower triangle is read.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.packing import pack
      >>> pack(jnp.array([[1, 2], [2, 3]])).tolist()
      [[3, 1], [2, 0]]
    """
    n = symmetric.shape[-1]
    if n % 2:
        pad = [(0, 0)] * (symmetric.ndim - 2) + [(0, 1), (0, 1)]
        symmetric, n = jnp.pad(symmetric, pad), n + 1
    half = n // 2
    none = [(0, 0)] * (symmetric.ndim - 2)
    left = jnp.pad(symmetric[..., :half], [*none, (1, 0), (0, 0)])
    right = jnp.swapaxes(symmetric[..., half:, half:], -1, -2)
    right = jnp.pad(right, [*none, (0, n + 1 - half), (0, 0)])
    packed = jnp.where(_holds_left(half), left, right)
    batch, (rows, width), size = packed.shape[:-2], packed_shape(n), (n + 1) * half
    flat = jnp.pad(packed.reshape(*batch, size), [*none, (0, rows * width - size)])
    return flat.reshape(*batch, rows, width)


def unpack(packed: jax.Array, n: int) -> jax.Array:
    """The inverse of `pack`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.packing import pack, unpack
      >>> unpack(pack(jnp.array([[1, 2], [2, 3]])), 2).tolist()
      [[1, 2], [2, 3]]
    """
    even = n + n % 2
    half = even // 2
    if packed.shape[-2:] != packed_shape(n):
        raise ValueError(f"expected [..., {packed_shape(n)}] for n = {n}, got {packed.shape}.")
    flat = packed.reshape(*packed.shape[:-2], math.prod(packed_shape(n)))
    packed = flat[..., : (even + 1) * half].reshape(*packed.shape[:-2], even + 1, half)
    below = jnp.where(_holds_left(half), packed, 0)[..., 1:, :]
    right = jnp.swapaxes(packed[..., :half, :], -1, -2)
    corner = _mirrored(right)
    upper = jnp.concatenate(
        [_mirrored(below[..., :half, :]), jnp.swapaxes(below[..., half:, :], -1, -2)], axis=-1
    )
    whole = jnp.concatenate(
        [upper, jnp.concatenate([below[..., half:, :], corner], axis=-1)], axis=-2
    )
    return whole[..., :n, :n]


def _holds_left(half: int) -> jax.Array:
    """Where a packed matrix holds elements of the left half."""
    return jnp.arange(2 * half + 1)[:, None] > jnp.arange(half)[None]


def _mirrored(lower: jax.Array) -> jax.Array:
    """A symmetric matrix from its lower triangle; elements above are not read."""
    n = lower.shape[-1]
    below = jnp.arange(n)[:, None] >= jnp.arange(n)[None]
    return jnp.where(below, lower, jnp.swapaxes(lower, -1, -2))
