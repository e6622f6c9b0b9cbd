"""Blocking: how a leaf is cut into blocks with Kronecker factors, with or without a mesh."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ....core.paths import path_string
from ..mesh.exchange import move_in_together, move_out, zeros
from ..mesh.placement import (
    WHOLE,
    Names,
    Placement,
    Spread,
    explicit_sizes,
    mesh_of,
    names_of,
    place,
)
from .blocks import BlockGrid, Blocks, block_grid
from .layout import Layout, MatrixAxes, layout
from .matrices import Axes


class Tensor(NamedTuple):
    """A tensor of a leaf, or its part on one device, cut into blocks `[*batch, *counts, *sizes]`."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    """`[*batch, *counts]`."""
    axes: tuple[int, ...]
    """Those with a factor."""
    inside: tuple[jax.Array | None, ...]
    """By axis, `[*batch, *counts]`: how much of it is not padding in each block; None for all of it."""
    summed: Names
    """Mesh axes over which a block's sums must be added up."""
    spread: Spread


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How a leaf is cut: into tensors, and these into blocks with factors on some of their axes.

    It is made for whole leaves; inside `per_shard`, `local` ones describe the part on one device.
    """

    layout: Layout | None
    """None for one tensor with all of the leaf's axes."""
    grids: tuple[BlockGrid, ...]
    """One for each tensor of the leaf."""
    factored: tuple[tuple[bool, ...], ...]
    """For each tensor, which axes have a factor."""
    placement: Placement = WHOLE
    """The placement on the mesh that the leaf is sharded over."""

    @property
    def leaf_names(self) -> Names:
        """Mesh axes over which a leaf's sums must be added up."""
        return tuple(name for names in self.placement.outside for name in names)

    @property
    def block_names(self) -> Names:
        """Mesh axes that share the blocks of the leaf, or cut through them."""
        return tuple(name for names in self.placement.inside for name in names)

    @functools.cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """By tensor, the leading axes of its state: the leaf's batch axes, or (1,)."""
        return ((1,),) if self.layout is None else self.layout.batches

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the leaf."""
        cut = frozenset(self.block_names) - frozenset(self.placement.summed)
        layers, names = 1, ()
        if self._batch_axes:
            names = self.placement.inside[self._batch_axes[0]] if self.placement.inside else ()
            layers = self.batches[0][0] * self.placement.parts(names)
        made = []
        for grid, marks, batch in zip(self.grids, self.factored, self.batches, strict=True):
            counts = (*batch, *grid.counts)
            spread = Spread(len(counts), layers, names, cut, self.placement.parts(tuple(cut)))
            lengths = [grid.inside(axis, math.prod(batch)) for axis in range(len(marks))]
            made.append(
                Tensor(
                    grid.sizes,
                    counts,
                    tuple(axis for axis, has in enumerate(marks) if has),
                    tuple(None if x is None else jnp.asarray(x.reshape(counts)) for x in lengths),
                    self.placement.summed,
                    spread,
                )
            )
        return made

    def to_blocks(self, leaves: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """For the leaf, and others like it, an array `[*batch, *counts, *sizes]` for each tensor."""
        return [self._cut(leaf) for leaf in move_in_together(leaves, self.placement)]

    def _cut(self, leaf: jax.Array) -> list[jax.Array]:
        pieces = (leaf[None],) if self.layout is None else self.layout.to_matrices(leaf)
        return [
            grid.to_blocks(piece).reshape(*batch, *grid.counts, *grid.sizes)
            for grid, piece, batch in zip(self.grids, pieces, self.batches, strict=True)
        ]

    def from_blocks(self, blocks: Sequence[jax.Array]) -> jax.Array:
        """The leaf of these blocks."""
        pieces = [
            grid.from_blocks(block.reshape(math.prod(batch), *block.shape[len(batch) :]))
            for grid, block, batch in zip(self.grids, blocks, self.batches, strict=True)
        ]
        leaf = pieces[0][0] if self.layout is None else self.layout.from_matrices(pieces)
        return move_out(leaf, self.placement)

    def placed(self, leaf: Any, *, sums: bool) -> "Blocking":
        """The same, placed on the mesh in the leaf's type.

        With `sums`, axes without a factor may be cut anywhere.
        """
        mesh = mesh_of(leaf)
        if mesh is None:
            return self
        cuts, free = [1] * len(leaf.shape), []
        for axis in self._batch_axes:
            cuts[axis] = leaf.shape[axis]
        for axis, at in self._grid_axes().items() if self._is_one_piece else ():
            grid, has_factor = self.grids[0], self.factored[0][at]
            even = grid.counts[at] * grid.sizes[at] == grid.sides[at]
            if has_factor and even:
                cuts[axis] = math.gcd(grid.counts[at], leaf.shape[axis])
            elif not has_factor and sums:
                free.append(axis)
        found = place(names_of(leaf), cuts, explicit_sizes(mesh), free)
        return dataclasses.replace(self, placement=found)

    def local(self) -> "Blocking":
        """The blocking of the part of the leaf that one device works on."""
        parts = [self.placement.parts(names) for names in self.placement.inside]
        grids = list(self.grids)
        for axis, at in self._grid_axes().items():
            if parts[axis] > 1:
                grids[0] = _shrunk(grids[0], at, parts[axis], self.factored[0][at])
        shrunk = None if self.layout is None else self.layout.shrunk(parts)
        return dataclasses.replace(self, layout=shrunk, grids=tuple(grids))

    def zeros(self, leaf: Any, dtype: Any, *, inside: bool) -> list[jax.Array]:
        """For each tensor zeros `[*batch, *counts]`, in place; with the blocks' own axes if `inside`."""
        made = []
        for batch, grid, names in zip(self.batches, self.grids, self._names, strict=True):
            shape = (*batch, *grid.counts, *grid.sizes)
            ndim = len(shape) if inside else len(batch) + len(grid.counts)
            made.append(zeros(shape[:ndim], dtype, leaf, names[:ndim]))
        return made

    @property
    def count_names(self) -> list[list[Names]]:
        """For each tensor the mesh axes that cut `[*batch, *counts]`."""
        parts = zip(self._names, self.batches, self.grids, strict=True)
        return [names[: len(batch) + len(grid.counts)] for names, batch, grid in parts]

    @property
    def _names(self) -> list[list[Names]]:
        """For each tensor the mesh axes that cut `[*batch, *counts, *sizes]`."""
        made, cut = [], self.placement.inside
        for batch, grid, marks in zip(self.batches, self.grids, self.factored, strict=True):
            names: list[Names] = [()] * (len(batch) + 2 * len(grid.sizes))
            for position, axis in enumerate(self._batch_axes if cut else ()):
                names[position] = cut[axis]
            for axis, at in self._grid_axes().items() if cut else ():
                behind = 0 if marks[at] else len(grid.sizes)
                names[len(batch) + at + behind] = cut[axis]
            made.append(names)
        return made

    @property
    def takes_flags(self) -> bool:
        """Whether flags of blocks are better sent as such than one for each element of the leaf."""
        inner = [axis for axes in self._groups for axis in axes[1:]]
        outside = self.placement.outside
        moved = bool(self.placement.moves)
        return moved and self._is_one_piece and not any(outside[axis] for axis in inner)

    def at_elements(self, flags: jax.Array, leaf: jax.Array) -> jax.Array:
        """For each element of a device's part of the leaf the flag of its block.

        Args:
          flags: of the blocks of all devices, `[*batch, *counts]`.
          leaf: the part; with `takes_flags`.
        """
        flags = flags[0] if self.layout is None or not self._batch_axes else flags
        for at, axes in enumerate(self._groups):
            names = self.placement.outside[axes[0]]
            length = math.prod(leaf.shape[axis] for axis in axes)
            count, whole = flags.shape[at], length * self.placement.parts(names)
            size = max(1, -(-whole // count))
            start = jax.lax.axis_index(names) * length if names else 0
            # The blocks that the part touches, and of these the part.
            touched = min(count, length // size + 2)
            first = jnp.minimum(start // size, count - touched)
            cells = jax.lax.dynamic_slice_in_dim(flags, first, touched, at)
            cells = jnp.repeat(cells, size, at)
            flags = jax.lax.dynamic_slice_in_dim(cells, start - first * size, length, at)
        order = [axis for axes in self._groups for axis in axes]
        flags = flags.reshape([leaf.shape[axis] for axis in order])
        return flags.transpose([order.index(axis) for axis in range(leaf.ndim)])

    @property
    def _batch_axes(self) -> tuple[int, ...]:
        return () if self.layout is None else self.layout.batch_axes

    @property
    def _groups(self) -> list[tuple[int, ...]]:
        """The axes of the leaf that make each axis of `[*batch, *counts]`."""
        if self.layout is None:
            return [(axis,) for axis in range(len(self.grids[0].sides))]
        batch = [(axis,) for axis in self._batch_axes]
        return [*batch, self.layout.row_axes, self.layout.column_axes]

    def _grid_axes(self) -> dict[int, int]:
        """The axes of the leaf that can be cut between blocks, and the tensors' axis each cuts."""
        if self.layout is None:
            return {axis: axis for axis in range(len(self.grids[0].sides))}
        return {self.layout.row_axes[0]: 0, self.layout.column_axes[0]: 1}

    @property
    def _is_one_piece(self) -> bool:
        layout = self.layout
        return layout is None or all(
            len(side) == 1 and side[0][1] == 1 for side in (layout.row_pieces, layout.column_pieces)
        )


def _shrunk(grid: BlockGrid, axis: int, parts: int, has_factor: bool) -> BlockGrid:
    """The grid of one of this many parts."""

    def divided(values: tuple[int, ...], by: int) -> tuple[int, ...]:
        return tuple(v // by if at == axis else v for at, v in enumerate(values))

    return BlockGrid(
        divided(grid.sides, parts),
        divided(grid.counts, parts if has_factor else 1),
        divided(grid.sizes, 1 if has_factor else parts),
    )


def blockings_of(
    tree: Any,
    axes: Axes | None,
    blocks: Blocks,
    *,
    vectors: bool = True,
    sums: bool = True,
) -> list[Blocking]:
    """The blocking of every leaf, in the order of the leaves.

    Args:
      tree: a tree of arrays or their shapes.
      axes: rows and columns of leaves, or None for tensors with the axes of the leaves.
      blocks: how tensors are cut, and which axes get a factor.
      vectors: whether tensors with one axis get a factor.
      sums: whether devices may share the axes of a block that have no factor.
    """

    def blocking(path: Any, leaf: Any) -> Blocking:
        name, found, vocabulary = path_string(path), None, None
        if axes is not None:
            chosen = axes if isinstance(axes, MatrixAxes) else axes(name)
            found = layout(leaf.shape, chosen, name)
            vocabulary = {None: None, "rows": 0, "columns": 1}[chosen.vocabulary]
        shapes = [piece[1:] for piece in found.pieces] if found else [tuple(leaf.shape)]
        factored = tuple(
            blocks.factored(shape, vocabulary)
            if len(shape) > 1 or vectors
            else (False,) * len(shape)
            for shape in shapes
        )
        grids = tuple(
            block_grid(shape, blocks.size, [axis for axis, has in enumerate(marks) if not has])
            for shape, marks in zip(shapes, factored, strict=True)
        )
        return Blocking(found, grids, factored).placed(leaf, sums=sums)

    return [blocking(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def blocks_in_words(blockings: Sequence[Blocking]) -> list[str]:
    """A text for every leaf: its blocks, and the sizes of their factors."""

    def words(batch: tuple[int, ...], grid: BlockGrid, marks: tuple[bool, ...]) -> str:
        sizes = "x".join(map(str, grid.sizes)) or "1"
        factors = ", ".join(
            str(n) if has else "none" for n, has in zip(grid.sizes, marks, strict=True)
        )
        count = math.prod(batch + grid.counts)
        return f"{count} block{'s' if count > 1 else ''} of {sizes}, factors of {factors or 'none'}"

    found = []
    for blocking in blockings:
        parts = zip(blocking.batches, blocking.grids, blocking.factored, strict=True)
        found.append("; ".join(words(*part) for part in parts))
    return found
