"""Refreshing matrices in phases, in place.

All of them on one step or, staggered, a phase on every step: both are the same program. Matrices are
assigned to phases, those of scanned layers layer by layer, and a phase is a loop that runs once or not
at all. It is a loop because XLA updates its carry in place; a conditional would copy every buffer on
the steps on which nothing happens.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ....core.once import once
from ....core.platform import platform
from ....core.row_major import row_major
from .batches import part_of, with_part
from .by_need import in_need, misfit_dtype, misfits, only_those, worst
from .refresh import Need
from .together import ELEMENTS, Unit, alike, carries_like, flat, worked_on

AT_ONCE = {"cpu": 2**21}
"""Elements refreshed at once, by platform; `ELEMENTS` on all others. A CPU gains nothing from more than
its caches hold, and pays for every new page of temporary memory."""


class Work(NamedTuple):
    """How like units are refreshed."""

    function: Callable[[Hashable, Any, Any], Any]
    max_elements: int
    need: Need | None

    def __call__(self, units: Sequence[Unit], carries: Sequence[Any]) -> list[Any]:
        """Their carries, refreshed where needed."""
        if self.need is None or not sum(unit.blocks for unit in units):
            return self.of(units, carries, None)
        return self.of(units, carries, in_need(units, carries, self.need, self.max_elements))

    def of(
        self, units: Sequence[Unit], carries: Sequence[Any], flags: Sequence[jax.Array] | None
    ) -> list[Any]:
        """Their carries, refreshed where flagged; all of them without flags."""
        if flags is None:
            return worked_on(units, self.function, self.max_elements, carries)
        flagged = [
            unit._replace(source=(unit.source, each))
            for unit, each in zip(units, flags, strict=True)
        ]
        return worked_on(flagged, only_those(self.function), self.max_elements, carries)


def refreshed(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    phases: int,
    due: Callable[[Any], jax.Array],
    max_elements: int | None = None,
    need: Need | None = None,
) -> list[Any]:
    """The units' carries, with due ones replaced by ``function(kind, carry, source)``.

    Units are refreshed as a whole, or layer by layer if they have layers, so that the timing does not
    depend on how a mesh cuts them. The function gets arrays with one batch axis.

    Args:
      units: all units.
      function: maps joined carries and sources to new carries.
      phases: the number of phases that units, or their layers, are assigned to.
      due: whether a phase is refreshed now; for an array of phases, an array of flags.
      max_elements: bound on the elements processed at once; ``None`` takes `AT_ONCE` on CPU, and
        `ELEMENTS` elsewhere.
      need: refresh only those due ones that need it.
    """
    if max_elements is None:
        max_elements = AT_ONCE.get(platform(), ELEMENTS)
    given, units = units, flat(units)
    likeness = alike(units)
    carries = [unit.carry for unit in units]
    parts = [unit.spread.layers if phases > 1 else 1 for unit in given]
    costs = [_cost(unit) / n for unit, n in zip(units, parts, strict=True) for _ in range(n)]
    dealt = iter(phases_of(costs, phases))
    groups: dict[tuple[int, Hashable], list[int]] = {}
    work, busy = Work(function, max_elements, need), jnp.zeros([], bool)
    for at, count in enumerate(parts):
        own = [next(dealt) for _ in range(count)]
        if count == 1:
            groups.setdefault((own[0], likeness[at]), []).append(at)
            continue
        flags = due(jnp.asarray(own, jnp.int32))
        busy, carry = _layer_by_layer(given[at], flags, busy, work)
        carries[at] = flat([given[at]._replace(carry=carry)])[0].carry
    for (phase, _), members in groups.items():
        refresh = functools.partial(work, [units[at] for at in members])
        # One group after the other, since XLA would run independent groups in parallel, and LAPACK's
        # threads then deadlock (jax #39292).
        busy, found = once(due(phase) & ~busy, refresh, [carries[at] for at in members])
        for at, carry in zip(members, found, strict=True):
            carries[at] = carry
    return carries_like(given, carries)


def _layer_by_layer(
    unit: Unit, due: jax.Array, busy: jax.Array, work: Work
) -> tuple[jax.Array, Any]:
    """A unit's carry, with the layers that are due `[layers]` replaced in place, one by one."""
    count, names = unit.blocks, unit.spread.layer_names
    first = jax.lax.axis_index(names) * count if names else 0
    ours = part_of(jnp.broadcast_to(due, unit.spread.layers), first, count)

    def layer(at: Any, carry: Any) -> Unit:
        part = lambda tree: jax.tree.map(lambda x: row_major(part_of(x, at, 1)), tree)
        return unit._replace(source=part(unit.source), carry=part(carry))

    def with_each(busy: jax.Array, carry: Any, body: Callable[[Any, Any], Any]) -> Any:
        """The carry after ``body(at, carry)`` for every layer that is due, one after the other."""

        def one(at: Any, state: Any) -> Any:
            busy, carry = state
            return once(ours[at] & ~busy, functools.partial(body, at), carry)

        return jax.lax.fori_loop(0, count, one, (busy, carry))

    flags: jax.Array | None = None
    need, blocks = work.need, flat([unit])[0].blocks
    if need is not None and blocks:
        # Of all layers before any is refreshed, since they share the bound.
        def measured(at: Any, found: jax.Array) -> jax.Array:
            (part,) = flat([layer(at, unit.carry)])
            (new,) = misfits([part], [part.carry], need, work.max_elements)
            return found.at[at].set(new)

        found = jnp.zeros((count, blocks // count), misfit_dtype(unit))
        busy, found = with_each(busy, found, measured)
        members = jnp.broadcast_to(ours[:, None], found.shape)
        flags = worst(found.ravel(), need, members.ravel()).reshape(found.shape)

    def refreshed(at: Any, carry: Any) -> Any:
        part = [layer(at, carry)]
        (joint,) = flat(part)
        new = work.of([joint], [joint.carry], None if flags is None else [flags[at]])
        (new,) = carries_like(part, new)
        return jax.tree.map(lambda x, new: with_part(x, new, at), carry, new)

    return with_each(busy, unit.carry, refreshed)


def _cost(unit: Unit) -> float:
    """Proportional to the work on all the leaf's matrices, independent of sharding."""
    work = [x.size * math.prod(x.shape[1:]) ** 0.5 for x in jax.tree.leaves(unit.source)]
    return unit.spread.shards * sum(work)


def phases_of(costs: Sequence[float], phases: int) -> list[int]:
    """A phase for every unit that stays whole, largest units first, each to the emptiest phase.

    Example:
      >>> from ravine.optimizers.matrix.batch.phases import phases_of
      >>> phases_of([1.0, 3.0, 2.0], 2)
      [1, 0, 1]
    """
    loads, found = [0.0] * phases, [0] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
        found[at] = min(range(phases), key=loads.__getitem__)
        loads[found[at]] += costs[at]
    return found
