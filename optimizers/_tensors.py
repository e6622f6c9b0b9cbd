"""State for blocks: trees of arrays that belong to the blocks of every leaf."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.tree_checks import check_real_leaves
from ._arithmetic import wide_dtype
from ._blocking import Blocking
from ._leaves import at_leaves
from .matrix.distribute import total
from .matrix.placement import Names


def factors_like(
    params: Any,
    blockings: Sequence[Blocking],
    make: Callable[[jax.Array, int], Any],
) -> Any:
    """A tree like `params` of tuples (tensors) of tuples (axes): ``make(scalars, size)`` or None."""

    def factors(leaf: Any, blocking: Blocking) -> Any:
        scalars = blocking.zeros(leaf, wide_dtype(leaf.dtype), inside=False)
        return tuple(
            tuple(
                make(zero, size) if has else None
                for size, has in zip(grid.sizes, marks, strict=True)
            )
            for zero, grid, marks in zip(scalars, blocking.grids, blocking.factored, strict=True)
        )

    return _map_leaves(factors, params, blockings)


def ones_like_scalars(params: Any, blockings: Sequence[Blocking]) -> Any:
    """A tree like `params` of tuples (tensors) of ones, one for each block."""

    def ones(leaf: Any, blocking: Blocking) -> Any:
        return tuple(x + 1 for x in blocking.zeros(leaf, wide_dtype(leaf.dtype), inside=False))

    return _map_leaves(ones, params, blockings)


def blocks_like(params: Any, blockings: Sequence[Blocking], dtype: Any = None) -> Any:
    """A tree like `params` of tuples (tensors) of zero blocks, by default in at least float32."""

    def blocks(leaf: Any, blocking: Blocking) -> Any:
        return tuple(blocking.zeros(leaf, dtype or wide_dtype(leaf.dtype), inside=True))

    return _map_leaves(blocks, params, blockings)


def _map_leaves(
    function: Callable[[Any, Blocking], Any], params: Any, blockings: Sequence[Blocking]
) -> Any:
    check_real_leaves(params)
    return at_leaves(params, list(map(function, jax.tree.leaves(params), blockings)))


def finite_blocks(blocks: jax.Array, order: int, summed: Names = ()) -> tuple[jax.Array, jax.Array]:
    """Which blocks are finite, `[L, *counts]`, and the blocks with zeros for what is not.

    A block counts as finite if its squares can be summed: a Gram matrix would hold that sum.
    """
    inside = tuple(range(blocks.ndim - order, blocks.ndim))
    usable = jnp.isfinite(total(jnp.sum(jnp.square(blocks), axis=inside), summed))
    return usable, jnp.where(jnp.isfinite(blocks), blocks, 0)


def identities(scalars: jax.Array, size: int) -> jax.Array:
    """An identity matrix for each of the zeros `[L, *counts]`."""
    eye = jnp.eye(size, dtype=scalars.dtype)
    return scalars[..., None, None] + jnp.broadcast_to(eye, (1,) * scalars.ndim + eye.shape)
