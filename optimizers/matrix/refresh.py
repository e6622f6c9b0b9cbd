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

from .batching import in_chunks, largest_chunk


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
        if self.first < self.every or not (math.isinf(self.first) or self.first == int(self.first)):
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

    def due(self, step: jax.Array, phase: int) -> jax.Array:
        """Whether a phase is refreshed at this step."""
        if math.isinf(self.first):
            return jnp.zeros([], bool)
        first = int(self.first)
        if self.phases == 1:
            return (step == first) | ((step >= first) & (step % self.every == 0))
        return (step > first - self.every) & ((step + phase) % self.every == 0)


class Unit(NamedTuple):
    """A stack of matrices of one leaf that are refreshed alike."""

    kind: Hashable
    """Units of one kind, with matrices of one shape, are worked on together."""
    source: jax.Array
    """`[B, n, m]`, read only."""
    carry: Any
    """A tree of arrays `[B, ...]`: what is refreshed."""


def refreshed(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, jax.Array], Any],
    schedule: Refresh,
    step: jax.Array,
    max_elements: int | None = None,
) -> list[Any]:
    """The units' carries, those that are due replaced by ``function(kind, carry, source)``.

    This is the one place where factors of different leaves come together, and so the place to
    distribute them over a mesh.
    """
    carries = [unit.carry for unit in units]
    sizes = [math.prod(unit.source.shape[1:]) ** 1.5 for unit in units]
    dealt = deal([unit.source.shape[0] for unit in units], sizes, schedule.phases)
    busy = jnp.zeros([], bool)
    for phase, parts in enumerate(dealt):
        involved = sorted({part.unit for part in parts})
        if not involved:
            continue

        def body(current: list[Any], parts: Any = parts, involved: Any = involved) -> list[Any]:
            place = {unit: at for at, unit in enumerate(involved)}
            for kind, members in _by_kind(parts, units).items():
                sources = _joined([_cut(units[part.unit].source, part) for part in members])
                old = _joined([_cut(current[place[part.unit]], part) for part in members])
                most = largest_chunk(sources.shape[1:], max_elements)
                new = in_chunks(functools.partial(function, kind[0]), old, most, beside=sources)
                start = 0
                for part in members:
                    piece = jax.tree.map(lambda x, s=start, n=part.length: x[s : s + n], new)
                    at = place[part.unit]
                    current[at] = _put(current[at], piece, part)
                    start += part.length
            return current

        # One after the other: LAPACK's threads do not bear to be called from two places at once (they
        # hang, or spoil the heap: jax #39292), and XLA runs what is independent side by side.
        due = schedule.due(step, phase) & ~busy
        busy, found = once(due, body, [carries[unit] for unit in involved])
        for unit, carry in zip(involved, found, strict=True):
            carries[unit] = carry
    return carries


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


class Part(NamedTuple):
    """Some neighbouring matrices of a unit."""

    unit: int
    start: int
    length: int


def deal(counts: Sequence[int], costs: Sequence[float], phases: int) -> list[list[Part]]:
    """Deals `counts[i]` matrices of `costs[i]` each to phases of nearly equal cost.

    Matrices of one cost are dealt in their order, so that few units are cut; what does not divide goes
    to the phases that have least.

    Example:
      >>> from ravine.optimizers.matrix.refresh import deal
      >>> [[tuple(part) for part in phase] for phase in deal([3, 2], [1.0, 1.0], 2)]
      [[(0, 0, 3)], [(1, 0, 2)]]
    """
    dealt: list[list[Part]] = [[] for _ in range(phases)]
    loads = [0.0] * phases
    for cost in sorted(set(costs), reverse=True):
        members = [at for at, own in enumerate(costs) if own == cost]
        total = sum(counts[at] for at in members)
        order = sorted(range(phases), key=loads.__getitem__)
        shares = [total // phases + (rank < total % phases) for rank in range(phases)]
        queue = [(at, 0, counts[at]) for at in members if counts[at]]
        for phase, share in zip(order, shares, strict=True):
            loads[phase] += share * cost
            while share:
                at, start, left = queue.pop(0)
                taken = min(share, left)
                dealt[phase].append(Part(at, start, taken))
                share -= taken
                if left > taken:
                    queue.insert(0, (at, start + taken, left - taken))
    return dealt


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


def _by_kind(parts: Sequence[Part], units: Sequence[Unit]) -> dict[Any, list[Part]]:
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        unit = units[part.unit]
        shapes = tuple((x.shape[1:], str(x.dtype)) for x in jax.tree.leaves(unit.carry))
        key = (unit.kind, unit.source.shape[1:], str(unit.source.dtype), shapes)
        groups.setdefault(key, []).append(part)
    return groups


def _cut(tree: Any, part: Part) -> Any:
    def cut(x: jax.Array) -> jax.Array:
        whole = part.length == x.shape[0]
        return x if whole else jax.lax.slice_in_dim(x, part.start, part.start + part.length)

    return jax.tree.map(cut, tree)


def _put(tree: Any, piece: Any, part: Part) -> Any:
    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        whole = part.length == x.shape[0]
        return new if whole else jax.lax.dynamic_update_slice_in_dim(x, new, part.start, 0)

    return jax.tree.map(put, tree, piece)


def _joined(trees: list[Any]) -> Any:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
