"""Blocks: the options, and the blocking of every leaf that follows from them."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from ....core.checks import check_amount, check_known
from ....core.options import options
from ....core.paths import path_string
from .blocking import BlockGrid, Blocking, block_grid
from .layout import MatrixAxes, layout
from .matrices import Axes

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
