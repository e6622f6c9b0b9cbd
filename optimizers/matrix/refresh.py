"""When costly quantities are computed anew, and how that is done in place.

Roots and eigenbases are refreshed every T steps: all on one step, or *staggered*, a T-th of them on
every step, so that all steps take the same time. Both are the same program: matrices are dealt to
phases, and a phase is a loop that runs once or not at all. A loop, because XLA updates what it carries
in place, where a conditional would copy every buffer on the steps on which nothing happens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .batching import in_chunks, joined, largest_chunk, part_of

REFRESHED_ELSEWHERE = 2**23
"""Elements refreshed at once but on CPU, 32 MB in float32: roots and bases take ten copies of that."""


@dataclasses.dataclass(frozen=True)
class Refresh:
    """The schedule; steps are counted from one.

    Attributes:
      every: the period T.
      start: the first step that uses the results, at least T (so that staggered ones are complete);
        ``None`` takes T, and infinity never starts.
      staggered: spread over the period.

    Raises:
      ValueError: for a period below one, or a start before the first refresh.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.refresh import Refresh
      >>> [step for step in range(1, 16) if Refresh(every=5, start=7).due(jnp.int32(step), 0)]
      [7, 10, 15]
    """

    every: int = 10
    start: float | None = None
    staggered: bool = False

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ValueError(
                f"every must be a whole number of steps, at least 1, got {self.every!r}."
            )
        if not self.first >= self.every or not (
            math.isinf(self.first) or self.first == int(self.first)
        ):
            raise ValueError(
                f"start must be a step from {self.every} (the refresh period) on, got {self.start!r}; "
                "None starts there."
            )

    @property
    def first(self) -> float:
        """The first step that uses the results."""
        return self.every if self.start is None else self.start

    @property
    def phases(self) -> int:
        """On how many steps of a period something is refreshed."""
        return self.every if self.staggered and self.every > 1 else 1

    def started(self, step: jax.Array) -> jax.Array:
        """Whether the results are used."""
        return step >= self.first if math.isfinite(self.first) else jnp.zeros([], bool)

    def follows(self, step: jax.Array, phase: int) -> jax.Array:
        """Whether a phase is refreshed at this step, where the first step has set all of them."""
        return (step > 1) & ((step - 1 + phase) % self.every == 0)

    def due(self, step: jax.Array, phase: int) -> jax.Array:
        """Whether a phase is refreshed at this step."""
        if math.isinf(self.first):
            return jnp.zeros([], bool)
        first = int(self.first)
        if self.phases == 1:
            return (step == first) | ((step >= first) & (step % self.every == 0))
        return (step > first - self.every) & ((step + phase) % self.every == 0)


class Unit(NamedTuple):
    """Stacks of matrices of one leaf that are refreshed alike."""

    kind: Hashable
    """Units of one kind, with arrays of the same shapes, are worked on together."""
    source: Any
    """A tree of arrays `[B, ...]`, read only."""
    carry: Any
    """A tree of arrays `[B, ...]`: what is refreshed."""
    shards: int = 1
    """How many devices have as many of the leaf's matrices each."""

    @property
    def cost(self) -> float:
        """Proportional to the work on all the leaf's matrices, however they are sharded."""
        work = [x.size * math.prod(x.shape[1:]) ** 0.5 for x in jax.tree.leaves(self.source)]
        return self.shards * sum(work)


def refreshed(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    phases: int,
    due: Callable[[int], jax.Array],
    max_elements: int | None = None,
) -> list[Any]:
    """The units' carries, those that are due replaced by ``function(kind, carry, source)``.

    Units stay whole, so that what is refreshed when does not depend on how a mesh cuts them. This is the
    one place where matrices of different leaves come together.

    Args:
      units: what there is.
      function: of joined carries and sources, to such carries.
      phases: among how many the units are dealt.
      due: whether a phase is refreshed now.
      max_elements: bound on the elements worked on at once, see `largest_chunk`.
    """
    carries = [unit.carry for unit in units]
    groups: dict[Any, list[int]] = {}
    for at, phase in enumerate(phases_of([unit.cost for unit in units], phases)):
        groups.setdefault((phase, *_likeness(units[at])), []).append(at)
    busy = jnp.zeros([], bool)
    for (phase, kind, _), members in groups.items():
        sources = [units[at].source for at in members]
        refresh = functools.partial(
            _together, functools.partial(function, kind), sources, max_elements
        )
        # One group after the other, as XLA would run side by side what does not depend on each other,
        # and LAPACK's threads do not bear it (jax #39292).
        busy, found = once(due(phase) & ~busy, refresh, [carries[at] for at in members])
        for at, carry in zip(members, found, strict=True):
            carries[at] = carry
    return carries


def _likeness(unit: Unit) -> tuple[Any, ...]:
    """What units must share to be worked on as one batch; first their kind."""
    arrays, structure = jax.tree.flatten((unit.source, unit.carry))
    return unit.kind, (structure, *((x.shape[1:], str(x.dtype)) for x in arrays))


def _together(
    function: Callable[[Any, Any], Any],
    sources: Sequence[Any],
    max_elements: int | None,
    carries: Sequence[Any],
) -> list[Any]:
    """The carries of some units, refreshed as one batch, or slice by slice of all of them.

    Slices are joined and written back where they were, so that no second copy of the whole is made.
    """
    counts = [jax.tree.leaves(carry)[0].shape[0] for carry in carries]
    elements = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(sources[0]))
    most = largest_chunk((elements,), max_elements, REFRESHED_ELSEWHERE)
    slices = max(1, min(-(-sum(counts) // most), *counts))
    lengths = [-(-count // slices) for count in counts]
    # A second size of chunk would be a second program: rather take somewhat more at once.
    size = sum(lengths) if slices > 1 and sum(lengths) <= 2 * most else most

    def batch(carries: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
        return joined(
            lambda carry, source: in_chunks(function, carry, size, beside=source), carries, sources
        )

    if slices == 1:
        return batch(carries, sources)

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
        found = batch(old, seen)
        return [
            jax.tree.map(
                functools.partial(_written, at=at, start=start, length=length), carry, new, before
            )
            for carry, new, before, start, length in zip(
                carries, found, old, starts, lengths, strict=True
            )
        ]

    return jax.lax.fori_loop(0, slices, one, list(carries))


def _written(
    whole: jax.Array, new: jax.Array, old: jax.Array, at: Any, start: Any, length: int
) -> jax.Array:
    """`whole` with `new` in its place, but for what the slice before has refreshed already."""
    if whole.shape[0] % length:
        fresh = start + jnp.arange(length) >= at * length
        new = jnp.where(fresh.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0)


def once(due: jax.Array, body: Callable[[Any], Any], carry: Any) -> tuple[jax.Array, Any]:
    """``body(carry)`` if `due`, else `carry`, without a copy of it; and False, when that is done.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.refresh import once
      >>> [int(once(jnp.array(due), lambda x: x + 1, jnp.int32(1))[1]) for due in (True, False)]
      [2, 1]
    """
    return jax.lax.while_loop(
        lambda state: state[0], lambda state: (jnp.zeros([], bool), body(state[1])), (due, carry)
    )


def phases_of(costs: Sequence[float], phases: int) -> list[int]:
    """A phase for every unit that stays whole, the largest units first to where there is least.

    Example:
      >>> from ravine.optimizers.matrix.refresh import phases_of
      >>> phases_of([1.0, 3.0, 2.0], 2)
      [1, 0, 1]
    """
    loads, found = [0.0] * phases, [0] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
        found[at] = min(range(phases), key=loads.__getitem__)
        loads[found[at]] += costs[at]
    return found
