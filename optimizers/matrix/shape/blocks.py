"""Blocks: a batch of tensors as a grid of smaller ones, each with its own Kronecker factors.

A factor of an axis of size n takes n^2 memory and n^3 arithmetic, so long axes are cut. The grid comes
first, `[L, N1, ..., Nk, b1, ..., bk]`: blocks are a batch for any order k, and a mesh axis that shards
an axis of the tensor shards that axis of the grid. All of this depends on shapes only.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from ....core.checks import check_amount, check_known
from ....core.options import options

Sides = Literal["both", "rows", "columns", "smaller"]
UNCUT_BOUND = 10_000
"""The longest axis with a factor if axes are not cut: the official SOAP's ``max_precond_dim``."""


@options("blocks")
class Blocks:
    """How parameters are cut into blocks, and which axes of these have a Kronecker factor.

    An axis has no factor, and is not cut, if it is longer than `bound`, if it is the vocabulary of an
    embedding or a head and longer than `vocabulary`, or if `sides` leaves it out;
    :func:`ravine.explain` shows which.

    Attributes:
      size: bound on the size of factors; longer axes are cut into blocks of equal size. ``None`` does
        not cut. 512 is our choice; Google's and Meta's default is 1024.
      bound: axes longer than this have no factor. ``None`` is any length if axes are cut, and otherwise
        10,000, the official SOAP's.
      vocabulary: the same for the rows of parameters with the role ``embedding`` and the columns of
        parameters with the role ``head``; ``None`` for any length. 8192 is our choice.
      sides: of matrices and tensors, the axes with a factor: ``"both"`` (all), ``"rows"``,
        ``"columns"`` or the ``"smaller"``.

    Raises:
      ValueError: for a bound below one, or unknown sides.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"up": {"kernel": jnp.ones((8, 6))}}
      >>> tx = ravine.shampoo(1e-3, blocks=ravine.Blocks(size=4, sides="rows"))
      >>> ravine.explain(tx, params).rows[0].how
      '2 blocks of 4x6, factors of 4, none'
    """

    size: int | None = 512
    bound: int | None = None
    vocabulary: int | None = 8192
    sides: Sides = "both"

    def __post_init__(self) -> None:
        for name in ("size", "bound", "vocabulary"):
            value = {f"blocks.{name}": getattr(self, name)}
            check_known(**value)
            check_amount(1, **value)

    def factored(self, shape: tuple[int, ...], vocabulary: int | None = None) -> tuple[bool, ...]:
        """Which axes of a tensor have a factor; `vocabulary` is the axis of the vocabulary."""
        bound = UNCUT_BOUND if self.size is None else math.inf
        bounds = [bound if self.bound is None else self.bound] * len(shape)
        if vocabulary is not None and self.vocabulary is not None:
            bounds[vocabulary] = min(bounds[vocabulary], self.vocabulary)
        within = [0 < size <= most for size, most in zip(shape, bounds, strict=True)]
        if self.sides != "both" and len(shape) > 1:
            smaller = min(range(len(shape)), key=shape.__getitem__)
            chosen = {"rows": 0, "columns": len(shape) - 1, "smaller": smaller}[self.sides]
            within = [has and axis == chosen for axis, has in enumerate(within)]
        return tuple(within)


BLOCKS = Blocks()
UNCUT = Blocks(size=None)


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
      >>> from ravine.optimizers.matrix.shape.blocks import block_grid
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
