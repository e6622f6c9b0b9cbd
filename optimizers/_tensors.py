"""Between trees of leaves and the blocks that Kronecker factors belong to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ._arithmetic import wide_dtype
from ._checks import check_real_leaves
from ._matrices import Axes
from .matrix.blocks import BlockGrid, block_grid
from .matrix.layout import Layout, MatrixAxes, layout
from .roles import path_string

Sides = Literal["both", "rows", "columns", "smaller"]


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How a leaf is cut: into tensors, and these into blocks with factors on some of their axes."""

    layout: Layout | None
    """None for one tensor with all of the leaf's axes."""
    grids: tuple[BlockGrid, ...]
    """One for each tensor of the leaf."""
    factored: tuple[tuple[bool, ...], ...]
    """Of each tensor, which axes have a factor."""

    def to_blocks(self, leaf: jax.Array) -> list[jax.Array]:
        """One array `[L, *counts, *sizes]` for each tensor of the leaf."""
        pieces = (leaf[None],) if self.layout is None else self.layout.to_matrices(leaf)
        return [grid.to_blocks(piece) for grid, piece in zip(self.grids, pieces, strict=True)]

    def from_blocks(self, blocks: Sequence[jax.Array]) -> jax.Array:
        """The leaf of these blocks."""
        pieces = [grid.from_blocks(block) for grid, block in zip(self.grids, blocks, strict=True)]
        return pieces[0][0] if self.layout is None else self.layout.from_matrices(pieces)


def blockings_of(
    tree: Any,
    axes: Axes | None,
    block: int | None,
    limit: int,
    sides: Sides,
    *,
    vectors: bool = True,
) -> list[Blocking]:
    """The blocking of every leaf, in the order of the leaves.

    Args:
      tree: of arrays or their shapes.
      axes: rows and columns of leaves, or None for tensors of the leaves' own order.
      block: bound on the size of a factor; longer axes are cut.
      limit: axes longer than this get no factor and are not cut.
      sides: which axes get a factor.
      vectors: whether tensors of one axis get a factor.
    """

    def blocking(path: Any, leaf: Any) -> Blocking:
        name, found = path_string(path), None
        if axes is not None:
            chosen = axes if isinstance(axes, MatrixAxes) else axes(name)
            found = layout(leaf.shape, chosen, name)
        shapes = [piece[1:] for piece in found.pieces] if found else [tuple(leaf.shape)]
        factored = tuple(
            _factored(shape, limit if len(shape) > 1 or vectors else 0, sides) for shape in shapes
        )
        grids = tuple(
            block_grid(shape, block, [axis for axis, has in enumerate(marks) if not has])
            for shape, marks in zip(shapes, factored, strict=True)
        )
        return Blocking(found, grids, factored)

    return [blocking(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _factored(shape: tuple[int, ...], limit: int, sides: Sides) -> tuple[bool, ...]:
    within = [0 < size <= limit for size in shape]
    if sides != "both" and len(shape) > 1:
        smaller = min(range(len(shape)), key=shape.__getitem__)
        chosen = {"rows": 0, "columns": len(shape) - 1, "smaller": smaller}[sides]
        within = [has and axis == chosen for axis, has in enumerate(within)]
    return tuple(within)


def check_blocking(block: int | None, limit: int, sides: Sides) -> None:
    """Raises for bounds and sides that make no sense."""
    block_grid((1,), block)
    if type(limit) is not int or limit < 1:
        raise ValueError(f"limit must be a whole number of at least 1, got {limit!r}.")
    if sides not in get_args(Sides):
        raise ValueError(f"sides must be one of {', '.join(get_args(Sides))}, got {sides!r}.")


def map_blocks(
    params: Any,
    blockings: Sequence[Blocking],
    function: Callable[[jax.Array, BlockGrid, tuple[bool, ...]], Any],
) -> Any:
    """A tree like `params` of tuples, one entry a tensor: ``function(blocks, grid, factored)``."""
    check_real_leaves(params)
    leaves = [
        tuple(
            function(*tensor)
            for tensor in zip(
                blocking.to_blocks(leaf), blocking.grids, blocking.factored, strict=True
            )
        )
        for leaf, blocking in zip(jax.tree.leaves(params), blockings, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def factors_like(
    params: Any,
    blockings: Sequence[Blocking],
    make: Callable[[jax.Array, int], Any],
) -> Any:
    """A tree like `params` of tuples (tensors) of tuples (axes): ``make(scalars, size)`` or None."""

    def factors(blocks: jax.Array, grid: BlockGrid, marks: tuple[bool, ...]) -> Any:
        sizes = zip(grid.sizes, marks, strict=True)
        return tuple(make(scalars_of(blocks, grid), size) if has else None for size, has in sizes)

    return map_blocks(params, blockings, factors)


def blocks_like(params: Any, blockings: Sequence[Blocking], dtype: Any = None) -> Any:
    """A tree like `params` of tuples (tensors) of zero blocks, by default in at least float32."""

    def zeros(blocks: jax.Array, *_: Any) -> jax.Array:
        return jnp.zeros_like(blocks, dtype=dtype or wide_dtype(blocks.dtype))

    return map_blocks(params, blockings, zeros)


def finite_blocks(blocks: jax.Array, order: int) -> tuple[jax.Array, jax.Array]:
    """Which blocks are finite, `[L, *counts]`, and the blocks with zeros for what is not.

    A block counts as finite if its squares can be summed: a Gram matrix would hold that sum.
    """
    inside = tuple(range(blocks.ndim - order, blocks.ndim))
    usable = jnp.isfinite(jnp.sum(jnp.square(blocks), axis=inside))
    return usable, jnp.where(jnp.isfinite(blocks), blocks, 0)


def scalars_of(blocks: jax.Array, grid: BlockGrid) -> jax.Array:
    """A zero for every block, `[L, *counts]`, sharded as the blocks are."""
    inside = tuple(range(blocks.ndim - len(grid.sizes), blocks.ndim))
    return jnp.zeros_like(blocks, dtype=wide_dtype(blocks.dtype)).sum(axis=inside)


def identities(scalars: jax.Array, size: int) -> jax.Array:
    """An identity matrix for each of the zeros `[L, *counts]`."""
    eye = jnp.eye(size, dtype=scalars.dtype)
    return scalars[..., None, None] + jnp.broadcast_to(eye, (1,) * scalars.ndim + eye.shape)
