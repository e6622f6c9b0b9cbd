r"""Kronecker factors: one matrix for every axis of a block.

For blocks of order k, `[..., b1, ..., bk]` with any batch axes in front, the *mode-i Gram matrix* is
:math:`G_{(i)} G_{(i)}^\top`, the unfolding along axis i times its transpose; multiplying along an axis
is the mode-i product. For matrices these are :math:`GG^\top`, :math:`G^\top G`, :math:`PG` and
:math:`GP`. No batch axis is ever reshaped away, so the sharding of the batch is that of the result.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ....core.platform import platform
from .newton_schulz import completed, halvings


def mode_gram(blocks: jax.Array, axis: int, order: int) -> jax.Array:
    """`[..., b, b]`: the Gram matrix of the blocks along one of their last `order` axes.

    On TPU its products take three passes of bfloat16 instead of six: its error of a few parts in 10^7 is
    far below what one gradient adds to statistics. On CPU large ones compute half of the matrix only.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.kronecker import mode_gram
      >>> g = jnp.array([[1.0, 2.0], [0.0, 3.0]])
      >>> mode_gram(g, 0, 2)
      Array([[5., 6.],
             [6., 9.]], dtype=float32)
      >>> mode_gram(g, 1, 2)
      Array([[ 1.,  2.],
             [ 2., 13.]], dtype=float32)
    """
    return _gram(blocks, axis, order, platform())


def mode_grams(
    blocks: jax.Array,
    axes: Sequence[int],
    order: int,
    others: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """`mode_gram` along each of these axes, of blocks rotated along all `others` by their factors."""
    rotated, on = [blocks] * len(axes), platform()
    if others is not None:
        along = [[None if at == axis else x for at, x in enumerate(others)] for axis in axes]
        rotated = [rotate(blocks, factors) for factors in along]
    return [_gram(x, axis, order, on) for x, axis in zip(rotated, axes, strict=True)]


def _gram(blocks: jax.Array, axis: int, order: int, on: str) -> jax.Array:
    letters = _LETTERS[:order]
    along, other = blocks.ndim - order + axis, letters.replace(letters[axis], "z")
    subscripts = f"...{letters},...{other}->...{letters[axis]}z"
    precision = "high" if on == "tpu" else "highest"

    def halved(x: jax.Array, depth: int) -> jax.Array:
        half = x.shape[along] // 2
        if depth == 0 or half == 0:
            return _einsum(subscripts, x, x, precision)
        first, second = jnp.split(x, [half], along)
        return completed(_einsum(subscripts, first, x, precision), halved(second, depth - 1))

    rows = blocks.shape[along]
    inner = math.prod(blocks.shape[-order:]) // max(rows, 1)
    return halved(blocks, halvings(rows, inner) if on == "cpu" else 0)


def mode_product(
    blocks: jax.Array, factor: jax.Array, axis: int, order: int, *, transposed: bool = False
) -> jax.Array:
    """The blocks multiplied along one axis by a factor `[..., b, b]`, or by its transpose.

    Element j of that axis becomes the sum over i of ``factor[j, i]`` times element i.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.kronecker import mode_product
      >>> mode_product(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]]), axis=1, order=2)
      Array([[3., 7.]], dtype=float32)
    """
    letters = _LETTERS[:order]
    other = letters.replace(letters[axis], "z")
    along = f"...{letters[axis]}z" if transposed else f"...z{letters[axis]}"
    # The order of the operands decides whether XLA has to transpose the result.
    if axis == 0:
        return _einsum(f"{along},...{letters}->...{other}", factor, blocks)
    return _einsum(f"...{letters},{along}->...{other}", blocks, factor)


def rotate(
    blocks: jax.Array, factors: Sequence[jax.Array | None], *, back: bool = False
) -> jax.Array:
    """Multiplies along every axis by its factor; None leaves the axis unchanged.

    Args:
      blocks: `[..., b1, ..., bk]`.
      factors: k of `[..., b, b]`.
      back: multiply by the transposed factors, which undoes a rotation.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.kronecker import rotate
      >>> rotate(jnp.ones((2, 1)), [jnp.array([[0.0, -1.0], [1.0, 0.0]]), None]).tolist()
      [[-1.0], [1.0]]
    """
    for axis, factor in enumerate(factors):
        if factor is not None:
            blocks = mode_product(blocks, factor, axis, len(factors), transposed=back)
    return blocks


_LETTERS = "abcdefghijklmnopqrstuvwxy"


def _einsum(
    subscripts: str, left: jax.Array, right: jax.Array, precision: str = "highest"
) -> jax.Array:
    return jnp.einsum(subscripts, left, right, precision=precision)
