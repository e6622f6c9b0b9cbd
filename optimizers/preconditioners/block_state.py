"""State for blocks: trees of arrays that belong to the blocks of every leaf, and access to them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...core.arithmetic import wide_dtype
from ...core.leaves import at_leaves
from ...core.tree_checks import check_real_leaves
from ..matrix.shape.blocking import Blocking


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


def nothing_like(params: Any, blockings: Sequence[Blocking]) -> Any:
    """A tree like `params` of tuples (tensors) of None."""
    return _map_leaves(lambda _, blocking: (None,) * len(blocking.grids), params, blockings)


def _map_leaves(
    function: Callable[[Any, Blocking], Any], params: Any, blockings: Sequence[Blocking]
) -> Any:
    check_real_leaves(params)
    return at_leaves(params, list(map(function, jax.tree.leaves(params), blockings)))


def zero_unless(usable: jax.Array, blocks: jax.Array) -> jax.Array:
    """Blocks `[..., *sizes]`, zero where they are not usable, `[...]`."""
    return jnp.where(usable[(..., *(None,) * (blocks.ndim - usable.ndim))], blocks, 0)


def fields(factors: Sequence[Any], name: str) -> list[jax.Array]:
    """A field of every factor of a tensor, for axes that have one."""
    return [getattr(factor, name) for factor in factors if factor is not None]


def by_axis(values: Sequence[Any], axes: Sequence[int], order: int) -> list[Any]:
    """What belongs to these axes of a tensor of this order, and None for all others."""
    found = dict(zip(axes, values, strict=True))
    return [found.get(axis) for axis in range(order)]


def with_fields(factors: Sequence[Any], **values: Sequence[Any]) -> tuple[Any, ...]:
    """A tensor's factors with fields replaced, on axes that have one."""
    left = iter(
        [dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)]
    )
    return tuple(factor and factor._replace(**next(left)) for factor in factors)


def identities(scalars: jax.Array, size: int) -> jax.Array:
    """An identity matrix for each of the zeros `[*batch, *counts]`."""
    eye = jnp.eye(size, dtype=scalars.dtype)
    return scalars[..., None, None] + jnp.broadcast_to(eye, (1,) * scalars.ndim + eye.shape)


def zeros_each(scalars: jax.Array, count: int) -> jax.Array:
    """So many zeros for each of the zeros `[*batch, *counts]`."""
    return scalars[..., None] + jnp.zeros((1,) * scalars.ndim + (count,), scalars.dtype)
