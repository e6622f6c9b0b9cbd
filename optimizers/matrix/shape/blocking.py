"""Blocking: how a leaf is cut into blocks with Kronecker factors, with or without a mesh.

A factor of an axis of size n takes n^2 memory and n^3 arithmetic, so long axes are cut. The grid comes
first, `[L, N1, ..., Nk, b1, ..., bk]`: blocks are a batch for any order k, and a mesh axis that shards
an axis of the tensor shards that axis of the grid. All of this depends on shapes only.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..mesh.exchange import move_in, move_out, zeros
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
from .layout import Layout


@dataclasses.dataclass(frozen=True)
class BlockGrid:
    """Tensors `[L, *sides]` cut into blocks `[L, *counts, *sizes]`, and back; made by `block_grid`."""

    sides: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def padding(self) -> float:
        """Share of the blocks' elements that is padding, in [0, 1)."""
        padded = math.prod(self.counts) * math.prod(self.sizes)
        return 1.0 - math.prod(self.sides) / padded if padded else 0.0

    def inside(self, axis: int, length: int) -> np.ndarray | None:
        """`[L, *counts]`: how much of an axis of each block is not padding; None for all of it."""
        count, size, side = self.counts[axis], self.sizes[axis], self.sides[axis]
        if count * size == side:
            return None
        lengths = np.minimum(size, side - size * np.arange(count, dtype=np.int32))
        along = [1 + axis == at for at in range(1 + len(self.counts))]
        cells = lengths.reshape([count if is_it else 1 for is_it in along])
        return np.broadcast_to(cells, (length, *self.counts))

    def to_blocks(self, tensors: Any) -> Any:
        """Blocks `[L, *counts, *sizes]` of tensors `[L, *sides]`, padded with zeros."""
        length, *sides = tensors.shape
        if tuple(sides) != self.sides:
            raise ValueError(f"expected tensors [L, {self.sides}], got {tensors.shape}.")
        cells = list(zip(self.counts, self.sizes, strict=True))
        beyond = [n * b - side for (n, b), side in zip(cells, self.sides, strict=True)]
        if any(beyond):
            library = np if isinstance(tensors, np.ndarray) else jnp
            tensors = library.pad(tensors, [(0, 0), *((0, more) for more in beyond)])
        order = len(self.sides)
        split = tensors.reshape(length, *(size for cell in cells for size in cell))
        grid, inside = range(1, 2 * order, 2), range(2, 2 * order + 1, 2)
        return split.transpose(0, *grid, *inside)

    def from_blocks(self, blocks: Any) -> Any:
        """The tensors `[L, *sides]` of blocks, without padding."""
        length, *shape = blocks.shape
        if tuple(shape) != self.counts + self.sizes:
            raise ValueError(
                f"expected blocks [L, {self.counts + self.sizes}], got {blocks.shape}."
            )
        order = len(self.sides)
        pairs = [axis for at in range(1, order + 1) for axis in (at, at + order)]
        padded = [n * b for n, b in zip(self.counts, self.sizes, strict=True)]
        tensors = blocks.transpose(0, *pairs).reshape(length, *padded)
        return tensors[(slice(None), *(slice(side) for side in self.sides))]


def block_grid(
    sides: Sequence[int], block: int | None = None, whole: Collection[int] = ()
) -> BlockGrid:
    """The grid of balanced blocks: as few as the bound allows, and then as small as possible.

    Args:
      sides: the tensors' shape, without their batch axis.
      block: bound on the sides of a block; None for one block.
      whole: axes that are not cut, since they get no factor.

    Raises:
      ValueError: if `block` is less than one.

    Example:
      >>> from ravine.optimizers.matrix.shape.blocking import block_grid
      >>> block_grid((300, 100), block=128)  # 3 x 100 rows, not 2 x 128 and 44
      BlockGrid(sides=(300, 100), counts=(3, 1), sizes=(100, 100))
      >>> block_grid((5, 3), block=4).padding  # 2 x 3 rows for 5
      0.16666666666666663
    """
    if block is not None and not (type(block) is int and block > 0):
        raise ValueError(f"block must be at least 1, or None for one block, got {block!r}.")
    bounds = [
        max(side, 1) if block is None or axis in whole else block for axis, side in enumerate(sides)
    ]
    counts = [max(1, -(-side // bound)) for side, bound in zip(sides, bounds, strict=True)]
    sizes = [-(-side // count) for side, count in zip(sides, counts, strict=True)]
    return BlockGrid(tuple(sides), tuple(counts), tuple(sizes))


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

    def repeated(self, n: int) -> "Tensor":
        """The same n times, with one batch axis."""
        times = lambda x: None if x is None else jnp.tile(x.reshape(-1), n)
        return self._replace(
            counts=(n * math.prod(self.counts),),
            inside=tuple(map(times, self.inside)),
            spread=self.spread._replace(batch_axes=1),
        )


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
        shards = self.placement.parts(tuple(cut)) if cut else 1
        made = []
        for grid, marks, batch in zip(self.grids, self.factored, self.batches, strict=True):
            counts = (*batch, *grid.counts)
            spread = Spread(len(counts), layers, names, cut, shards)
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

    def to_blocks(self, leaf: jax.Array) -> list[jax.Array]:
        """For each tensor of the leaf its blocks `[*batch, *counts, *sizes]`."""
        leaf = move_in(leaf, self.placement) if self.placement.moves else leaf
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
        return move_out(leaf, self.placement) if self.placement.moves else leaf

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
    def _batch_axes(self) -> tuple[int, ...]:
        return () if self.layout is None else self.layout.batch_axes

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
