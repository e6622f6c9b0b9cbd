"""Layout: a parameter as a batch of matrices, and a matrix as a grid of blocks.

Attention kernels are `[in, heads, head width]`, scanned ones may have their layer axis anywhere, and
some kernels are several matrices in one. `MatrixAxes` says which axes are which; a `Layout` maps a leaf
to matrices `[L, M, N]` and back, exactly. All of this depends on shapes only.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..mesh.placement import Names, names_of, spec


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a leaf are the rows and the columns of its matrices; all others are batch.

    Example:
      >>> from ravine.optimizers.matrix.shape.layout import MatrixAxes
      >>> transposed = MatrixAxes(-1, -2)  # [..., out, in]
      >>> query_by_head = MatrixAxes((-3,), (-2, -1), column_parts=12)  # [layers, in, heads, width]
      >>> fused_qkv = MatrixAxes((-2,), (-1,), column_parts=(768, 256, 256))
    """

    rows: tuple[int, ...]
    """Axes of the inputs (fan-in), flattened in this order; negative ones count from the end. One axis
    may be given as a number."""
    columns: tuple[int, ...]
    """Axes of the outputs (fan-out), in the same way."""
    row_parts: int | tuple[int, ...] = 1
    """A number splits the flattened rows into that many equal parts, each a separate matrix of the
    batch; a tuple of sizes splits them into pieces of unequal shape."""
    column_parts: int | tuple[int, ...] = 1
    """The same for columns."""
    vocabulary: Literal["rows", "columns"] | None = dataclasses.field(default=None, repr=False)
    """The side that indexes the vocabulary, if there is one: the rows of embeddings, the columns of
    heads; :func:`by_role` fills it in."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            axes = getattr(self, name)
            object.__setattr__(self, name, (axes,) if isinstance(axes, int) else tuple(axes))
        for name in ("row_parts", "column_parts"):
            parts = getattr(self, name)
            object.__setattr__(self, name, tuple(parts) if isinstance(parts, list) else parts)


EXPLICIT = jax.sharding.AxisType.Explicit
DEFAULT = MatrixAxes((-2,), (-1,))
"""`[..., in, out]`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf as matrices `[L, M, N]`, and back; made by `layout`.

    The batch runs over the batch axes in the leaf's order, then row parts, then column parts, the last
    fastest. Pieces of unequal size are ordered by rows: all columns of the first rows, then of the
    next.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    row_pieces: tuple[tuple[int, int], ...]  # (rows, equal parts) of each piece
    column_pieces: tuple[tuple[int, int], ...]

    @functools.cached_property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """(L, M, N) of each piece."""
        return tuple(
            (self._batch * p * q, rows // p, columns // q)
            for (rows, p), (columns, q) in itertools.product(self.row_pieces, self.column_pieces)
        )

    @functools.cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """L of each piece as axes: the leaf's batch axes, the last times the parts; (1,) if none."""
        axes = [self.shape[axis] for axis in self.batch_axes] or [1]
        return tuple(
            (*axes[:-1], axes[-1] * p * q)
            for (_, p), (_, q) in itertools.product(self.row_pieces, self.column_pieces)
        )

    def cuts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By axis of the leaf, the number of parts into which shards may cut it; and axes to cut
        anywhere.

        Shards may cut the batch between matrices, and the slowest axis of rows and columns in one
        piece.
        """
        cuts = tuple(n if axis in self.batch_axes else 1 for axis, n in enumerate(self.shape))
        sides = ((self.row_axes, self.row_pieces), (self.column_axes, self.column_pieces))
        free = [axes[0] for axes, side in sides if len(side) == 1 and side[0][1] == 1]
        return cuts, tuple(free)

    def to_matrices(self, leaf: Any) -> tuple[Any, ...]:
        """The pieces `[L, M, N]` of a leaf: a NumPy or JAX array, of any dtype."""
        if leaf.shape != self.shape:
            raise ValueError(f"expected an array of shape {self.shape}, got {leaf.shape}.")
        rows, columns = (sum(n for n, _ in side) for side in (self.row_pieces, self.column_pieces))
        # JAX omits a transposition or a reshape that changes nothing.
        ordered = leaf.transpose(self._order)
        flat = _reshape(ordered, (self._batch, rows, columns), self._names_of_sides)
        return tuple(
            _fold(block, p, q)
            for strip, p in _split(flat, self.row_pieces, axis=1)
            for block, q in _split(strip, self.column_pieces, axis=2)
        )

    def from_matrices(self, pieces: Sequence[Any]) -> Any:
        """The leaf of these pieces: the exact inverse of `to_matrices`."""
        if (got := tuple(piece.shape for piece in pieces)) != self.pieces:
            raise ValueError(f"expected pieces of shapes {self.pieces}, got {got}.")
        remaining = iter(pieces)
        strips = [
            _join([_unfold(next(remaining), p, q) for _, q in self.column_pieces], axis=2)
            for _, p in self.row_pieces
        ]
        flat = _join(strips, axis=1)
        ordered = _reshape(flat, [self.shape[axis] for axis in self._order], self._names_of_axes)
        return ordered.transpose([self._order.index(axis) for axis in range(len(self.shape))])

    def shrunk(self, parts: Sequence[int]) -> "Layout":
        """The layout of one of this many equal parts per axis; only sides in one piece are cut."""

        def side(
            axes: tuple[int, ...], pieces: tuple[tuple[int, int], ...]
        ) -> tuple[tuple[int, int], ...]:
            cut = math.prod(parts[axis] for axis in axes)
            return pieces if cut == 1 else tuple((size // cut, equal) for size, equal in pieces)

        return dataclasses.replace(
            self,
            shape=tuple(size // part for size, part in zip(self.shape, parts, strict=True)),
            row_pieces=side(self.row_axes, self.row_pieces),
            column_pieces=side(self.column_axes, self.column_pieces),
        )

    def _names_of_sides(self, names: Sequence[Names]) -> Sequence[Names]:
        """The mesh axes that cut batch, rows and columns, from those that cut the leaf's ordered axes.

        Shards can cut the slowest axis of the batch, and of rows and columns in one piece.
        """
        pieces = (((1, 1),), self.row_pieces, self.column_pieces)
        able = [len(side) == 1 and side[0][1] == 1 for side in pieces]
        firsts = [self._order.index(axes[0]) if axes else None for axes in self._sides]
        return [
            () if first is None or not is_able else names[first]
            for first, is_able in zip(firsts, able, strict=True)
        ]

    def _names_of_axes(self, names: Sequence[Names]) -> Sequence[Names]:
        """The inverse of `_names_of_sides`."""
        found: list[Names] = [()] * len(self.shape)
        for side, axes in zip(names, self._sides, strict=True):
            for axis in axes[:1]:
                found[self._order.index(axis)] = side
        return found

    @functools.cached_property
    def _sides(self) -> tuple[tuple[int, ...], ...]:
        return self.batch_axes, self.row_axes, self.column_axes

    @functools.cached_property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.row_axes + self.column_axes

    @functools.cached_property
    def _batch(self) -> int:
        return math.prod(self.shape[axis] for axis in self.batch_axes)


def layout(shape: Sequence[int], axes: MatrixAxes = DEFAULT, name: str = "") -> Layout:
    """The layout of a leaf of this shape.

    Args:
      shape: the shape of the leaf.
      axes: which axes are rows and columns.
      name: the leaf's path, for messages.

    Raises:
      ValueError: for fewer than two axes; axes out of range, missing or named twice; parts that do
        not divide their side, or sizes that do not add up to it.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.shape.layout import MatrixAxes, layout
      >>> kernel = jnp.zeros((3, 3, 16, 32))  # [height, width, in, out]
      >>> layout(kernel.shape, MatrixAxes((0, 1, 2), (3,))).to_matrices(kernel)[0].shape
      (1, 144, 32)
      >>> layout((8, 64, 96), MatrixAxes((1,), (2,), column_parts=(64, 16, 16))).pieces
      ((8, 64, 64), (8, 64, 16), (8, 64, 16))
    """
    shape = tuple(shape)
    ndim, leaf = len(shape), f"the parameter {name!r} of shape {shape}"
    if ndim < 2:
        raise ValueError(
            f"{leaf} has fewer than two axes, so it is not a matrix; give it another role."
        )
    if not axes.rows or not axes.columns:
        raise ValueError(f"{leaf}: rows and columns need at least one axis each, got {axes}.")
    if wrong := [axis for axis in (*axes.rows, *axes.columns) if not -ndim <= axis < ndim]:
        raise ValueError(f"{leaf} has no axis {wrong[0]}; correct {axes}.")
    rows, columns = (tuple(axis % ndim for axis in side) for side in (axes.rows, axes.columns))
    if len({*rows, *columns}) < len(rows + columns):
        raise ValueError(f"{leaf}: {axes} names an axis twice; each is a row, a column or batch.")

    def cut(side: str, chosen: tuple[int, ...], parts: Any) -> tuple[tuple[int, int], ...]:
        size = math.prod(shape[axis] for axis in chosen)
        sizes = parts if isinstance(parts, tuple) else (parts,)
        if not sizes or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"{leaf}: {side}_parts must be positive integers, got {parts!r}.")
        if isinstance(parts, tuple):
            if sum(parts) != size:
                raise ValueError(
                    f"{leaf}: {side}_parts {parts} add up to {sum(parts)}, not to its {size} {side}s."
                )
            return tuple((n, 1) for n in parts)
        if size % parts:
            raise ValueError(
                f"{leaf}: {side}_parts {parts} does not divide its {size} {side}s; give a divisor "
                "(for heads, their number) or a tuple of sizes."
            )
        return ((size, parts),)

    return Layout(
        shape=shape,
        batch_axes=tuple(axis for axis in range(ndim) if axis not in rows + columns),
        row_axes=rows,
        column_axes=columns,
        row_pieces=cut("row", rows, axes.row_parts),
        column_pieces=cut("column", columns, axes.column_parts),
    )


def _split(x: Any, side: tuple[tuple[int, int], ...], axis: int) -> list[tuple[Any, int]]:
    if len(side) == 1:
        return [(x, side[0][1])]
    ends = itertools.accumulate(size for size, _ in side[:-1])
    pieces = _library(x).split(x, list(ends), axis)
    return [(piece, parts) for piece, (_, parts) in zip(pieces, side, strict=True)]


def _join(arrays: list[Any], axis: int) -> Any:
    return arrays[0] if len(arrays) == 1 else _library(arrays[0]).concatenate(arrays, axis=axis)


def _fold(x: Any, p: int, q: int) -> Any:
    batch, m, n = x.shape[0], x.shape[1] // p, x.shape[2] // q
    if p * q == 1:
        return x
    parts = _reshape(x, (batch, p, m, q, n), _names_of_batch).transpose(0, 1, 3, 2, 4)
    return _reshape(parts, (batch * p * q, m, n), _names_of_batch)


def _unfold(x: Any, p: int, q: int) -> Any:
    batch, m, n = x.shape[0] // (p * q), *x.shape[1:]
    if p * q == 1:
        return x
    parts = _reshape(x, (batch, p, q, m, n), _names_of_batch).transpose(0, 1, 3, 2, 4)
    return _reshape(parts, (batch, p * m, q * n), _names_of_batch)


def _names_of_batch(names: Sequence[Names]) -> Sequence[Names]:
    """The mesh axes that cut the first axis; no other axis can be cut."""
    return names[:1]


def _reshape(
    x: Any, shape: Sequence[int], names_after: Callable[[Sequence[Names]], Sequence[Names]]
) -> Any:
    """``x.reshape(shape)``, cut as far as it can be: by what `names_after` makes of what cuts `x`."""
    is_on_mesh = isinstance(x, jax.Array) and EXPLICIT in jax.typeof(x).sharding.mesh.axis_types
    if not is_on_mesh or not any(before := names_of(x)):  # never cut inside `jax.shard_map`
        return x.reshape(shape)
    after = names_after(before)
    kept = [names if names in after else () for names in before]
    if kept != list(before):
        x = jax.reshard(x, spec(kept))
    if x.shape == tuple(shape):
        return x
    whole = [()] * (len(shape) - len(after))
    return jax.lax.reshape(x, tuple(shape), out_sharding=spec([*after, *whole]))


def _library(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
