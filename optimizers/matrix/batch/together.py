"""Blocks of different leaves, processed together: few programs for any number of leaves.

Work on blocks of one shape is compiled once for all leaves that have such blocks, and runs on slices of
all of them, in a loop that writes every result over its operand. So neither compile time nor temporary
memory grows with the model.
"""

import functools
import math
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ....core.row_major import row_major
from ..mesh.placement import ALONE, Spread
from .batches import joined, part_of, with_part

ELEMENTS = 2**23
"""Elements processed at once, 32 MB in float32; for roots and bases, which need ten times that as
temporary memory, on all platforms except CPU."""


class Unit(NamedTuple):
    """Stacks of one leaf's blocks, or of their factors, which are all processed the same way."""

    kind: Hashable
    """Units of one kind, with arrays of the same shapes, are processed together."""
    source: Any
    """A tree of arrays `[B, ...]`, read only."""
    carry: Any
    """A tree of arrays `[B, ...]` that are replaced."""
    spread: Spread = ALONE
    is_whole: bool = False
    """Do not cut into slices, for example where devices exchange sums: no collective in a loop."""
    growth: int = 1
    """The growth of arrays while they are processed, if they are stored packed."""

    @property
    def elements(self) -> int:
        """How many elements belong to one block."""
        trees = (jax.tree.leaves(tree) for tree in (self.source, self.carry))
        most = max(sum(math.prod(x.shape[1:]) for x in arrays) for arrays in trees)
        return max(1, most * self.growth)

    @property
    def blocks(self) -> int:
        """The number of blocks; zero if nothing is to be replaced."""
        return next((x.shape[0] for x in jax.tree.leaves(self.carry)), 0)


def flat(units: Sequence[Unit]) -> list[Unit]:
    """The same units, with one batch axis."""

    def one(unit: Unit) -> Unit:
        axes = unit.spread.batch_axes
        if axes == 1:
            return unit
        joint = lambda x: x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:])
        source, carry = jax.tree.map(joint, (unit.source, unit.carry))
        return unit._replace(source=source, carry=carry, spread=unit.spread._replace(batch_axes=1))

    return list(map(one, units))


def carries_like(units: Sequence[Unit], carries: Sequence[Any]) -> list[Any]:
    """Carries of `flat` units, in the shapes of those of the units."""

    def one(unit: Unit, carry: Any) -> Any:
        if unit.spread.batch_axes == 1:
            return carry
        return jax.tree.map(lambda new, old: new.reshape(old.shape), carry, unit.carry)

    return list(map(one, units, carries))


def alike(units: Sequence[Unit]) -> list[Hashable]:
    """For each unit what it must share with others to be processed as one batch with them."""

    def one(unit: Unit) -> Hashable:
        arrays, structure = jax.tree.flatten((unit.source, unit.carry))
        shapes = tuple((x.shape[1:], str(x.dtype)) for x in arrays)
        return unit.kind, unit.is_whole, structure, shapes

    return list(map(one, units))


def together(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    max_elements: int | None = None,
    *,
    any_axes: bool = False,
) -> list[Any]:
    """The units' carries, replaced by ``function(kind, carry, source)``, of arrays with one batch axis.

    Units with few blocks are joined whole, those with many slice by slice. A large unit that cannot be
    sliced as finely as its group is processed alone, since joining would make a second copy of it.

    Args:
      units: all units.
      function: maps joined carries and sources to new carries.
      max_elements: bound on the elements processed at once; ``None`` takes `ELEMENTS`.
      any_axes: the function takes any number of batch axes, and a unit that is processed alone and
        whole keeps its own. XLA for CPU updates an array in place only in the shape that it has.
    """
    max_elements = ELEMENTS if max_elements is None else max_elements
    given, units = units, flat(units)
    carries = [unit.carry for unit in units]
    found: dict[int, Any] = {}
    groups: dict[Hashable, list[int]] = {}
    for at, (unit, likeness) in enumerate(zip(units, alike(units), strict=True)):
        if unit.blocks:
            groups.setdefault(likeness, []).append(at)
    for members in groups.values():
        for batch in _batches(members, units, _most(units[members[0]], max_elements)):
            most, unit = _most(units[batch[0]], max_elements), given[batch[0]]
            if any_axes and len(batch) == 1 and units[batch[0]].blocks <= most:
                found[batch[0]] = function(unit.kind, unit.carry, unit.source)
                continue
            new = worked_on([units[at] for at in batch], function, max_elements)
            for at, carry in zip(batch, new, strict=True):
                carries[at] = carry
    return [found.get(at, carry) for at, carry in enumerate(carries_like(given, carries))]


def _batches(members: Sequence[int], units: Sequence[Unit], most: int) -> list[list[int]]:
    """Which of these like units are joined."""
    slices = _slices([units[at] for at in members], most)
    joined = not units[members[0]].is_whole
    many = [at for at in members if joined and units[at].blocks >= slices]
    few = [at for at in members if at not in many]
    if not many:
        return [[at] for at in members]
    return [many, *(_batches(few, units, most) if few else ())]


def _most(unit: Unit, max_elements: int) -> int:
    """How many blocks are processed at once."""
    return sys.maxsize if unit.is_whole else max(1, max_elements // unit.elements)


def _slices(units: Sequence[Unit], most: int) -> int:
    return -(-sum(unit.blocks for unit in units) // most)


def worked_on(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    max_elements: int,
    carries: Sequence[Any] | None = None,
) -> list[Any]:
    """The carries of like units, replaced as one batch, or slice by slice across all of them.

    Slices are joined and written back in place, so that no second copy of the whole is made.

    Args:
      units: like units.
      function: as for `together`.
      max_elements: as for `together`.
      carries: used instead of the units' own; of the same shapes.
    """
    carries = [unit.carry for unit in units] if carries is None else carries
    sources, counts = [unit.source for unit in units], [unit.blocks for unit in units]
    work = functools.partial(function, units[0].kind)
    most = _most(units[0], max_elements)
    slices = max(1, min(_slices(units, most), *counts))
    lengths = [-(-count // slices) for count in counts]
    # A second size of chunk would be a second program: process somewhat more at once instead.
    size = sum(lengths) if slices > 1 and sum(lengths) <= 2 * most else most
    if slices == 1:
        return joined(work, carries, sources, most=size)

    def one(at: jax.Array, carries: Sequence[Any]) -> list[Any]:
        starts = [
            jnp.minimum(at * length, count - length)
            for count, length in zip(counts, lengths, strict=True)
        ]
        old, seen = (
            [
                jax.tree.map(lambda x, start=start, length=length: part_of(x, start, length), tree)
                for tree, start, length in zip(trees, starts, lengths, strict=True)
            ]
            for trees in (carries, sources)
        )
        found = joined(work, *jax.tree.map(row_major, (old, seen)), most=size)
        return [
            jax.tree.map(
                functools.partial(_written, start=start, first=at * length, slices=slices),
                carry,
                new,
                before,
            )
            for carry, new, before, start, length in zip(
                carries, found, old, starts, lengths, strict=True
            )
        ]

    return jax.lax.fori_loop(0, slices, one, list(carries))


def _written(
    whole: jax.Array, new: jax.Array, old: jax.Array, start: Any, first: Any, slices: int
) -> jax.Array:
    """`whole` with `new` from `start` on, except before `first`, where the work is already done."""
    length = new.shape[0]
    if whole.shape[0] != slices * length:
        fresh = start + jnp.arange(length) >= first
        new = jnp.where(fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return with_part(whole, new, start)
