"""When expensive quantities are recomputed, and how that is done in place.

Roots and eigenbases are refreshed every T steps: all on one step, or *staggered*, a T-th of them on
every step, so that all steps take the same time. Both are the same program: matrices are assigned to
phases, those of scanned layers layer by layer, and a phase is a loop that runs once or not at all. It
is a loop because XLA updates its carry in place; a conditional would copy every buffer on the steps on
which nothing happens.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ....core.arguments import MaybeInfinite
from ....core.checks import check_known, check_positive, check_whole
from ....core.options import options
from .batches import part_of
from .by_need import Need, in_need, only_those
from .once import once
from .together import Unit, row_major, worked_on


@options("refresh")
class Refresh:
    r"""When roots and bases are recomputed; steps are counted from one.

    Attributes:
      every: the period T.
      start: the first step that uses the results, at least T (so that staggered ones are complete);
        ``None`` takes T; with infinity they are never used.
      staggered: spread the work over the period.
      statistics_every: the gradients of the first step and of every k-th step update the statistics, k
        at most T, with the decay rate :math:`\beta^k`, so that their mean covers the same number of
        steps. A sum (Shampoo's ``b2=1``) counts such a gradient k times.
      need: if given, a block that is due is refreshed only if its root or basis no longer fits its
        statistics: if the misfit is larger than this. For a basis it is the fraction of
        :math:`Q^\top L Q` off the diagonal, in :math:`\lVert\cdot\rVert_F`; for a root, the largest
        element of :math:`L X^p - I`. Combine it with a short period.
      most: with `need`, at most this share of the blocks of a shape is refreshed in one step, worst
        first; on a mesh, of each device's blocks, apart by the mesh axes that cut their leaf; and if
        staggered, of each phase's. It does not apply before the start, so that no block starts without
        a root or basis.

    Raises:
      ValueError: for a period below one, a start before the first refresh, statistics that are updated
        more rarely than they are used, or `most` without `need`.

    Example:
      >>> import jax.numpy as jnp
      >>> import ravine
      >>> [step for step in range(1, 16) if ravine.Refresh(every=5, start=7).due(jnp.int32(step), 0)]
      [7, 10, 15]
    """

    every: int = 10
    start: MaybeInfinite | None = None
    staggered: bool = False
    statistics_every: int = 1
    need: float | None = None
    most: float = 1.0

    def __post_init__(self) -> None:
        check_known(**{"refresh.every": self.every, "refresh.start": self.start})
        check_whole(1, **{"refresh.every": self.every})
        if not self.first >= self.every or not (
            math.isinf(self.first) or self.first == int(self.first)
        ):
            raise ValueError(
                f"refresh.start must be a step from {self.every} (the period) on, got {self.start!r}; "
                "None starts there."
            )
        check_whole(1, **{"refresh.statistics_every": self.statistics_every})
        if self.statistics_every > self.every:
            raise ValueError(
                f"refresh.statistics_every must be at most {self.every} (the period), got "
                f"{self.statistics_every}: between, nothing new would be found."
            )
        if self.need is not None:
            check_positive(**{"refresh.need": self.need})
        if not 0 < self.most <= 1:
            raise ValueError(f"refresh.most must lie in (0, 1], got {self.most!r}.")
        if self.most < 1 and self.need is None:
            raise ValueError(
                f"refresh.most={self.most!r} bounds what is refreshed by need; give refresh.need too, "
                "as need=0.1."
            )

    @property
    def first(self) -> float:
        """The first step that uses the results."""
        return self.every if self.start is None else self.start

    @property
    def phases(self) -> int:
        """The number of steps of a period on which anything is refreshed."""
        return self.every if self.staggered and self.every > 1 else 1

    @property
    def words(self) -> str:
        """For explanations: what differs from the defaults, after a comma."""
        k, share = self.statistics_every, "" if self.most == 1 else f", at most {self.most:.3g}"
        statistics = "" if k == 1 else f", statistics every {k}"
        return statistics + (
            "" if self.need is None else f", refreshed if off by {self.need:.3g}{share}"
        )

    def check_at_once(self, name: str) -> None:
        """Raises for a start if results are used as soon as there are any."""
        if self.start is not None:
            raise ValueError(
                f"refresh.start is not for {name}, whose bases are found on the first step and used "
                f"from the second; leave it out, got {self.start!r}."
            )

    def by_need(
        self, step: jax.Array, misfit: Callable[[Hashable, Any, Any], jax.Array]
    ) -> Need | None:
        """The need that selects which due blocks are refreshed; None for all."""
        if self.need is None:
            return None
        return Need(misfit, self.need, self.most, bounded=step > self.first)

    def learning(self, step: jax.Array) -> jax.Array | None:
        """Whether this step's gradient updates the statistics, None for always.

        True on the first step, and then such that a refresh at the end of a period includes its last
        gradient.
        """
        k = self.statistics_every
        return None if k == 1 else (step == 1) | (step % k == 0)

    def learned(self, step: jax.Array) -> jax.Array:
        """How many gradients are in the statistics, by `learning`."""
        k = self.statistics_every
        return step if k == 1 else step // k + 1

    def learning_from_first(self, step: jax.Array) -> jax.Array | None:
        """Like `learning`, if the first step sets everything and periods count from it (`follows`)."""
        k = self.statistics_every
        return None if k == 1 else (step - 1) % k == 0

    def decay(self, b2: Any) -> Any:
        """A decay rate per step, converted to one per gradient that updates the statistics."""
        return b2 if self.statistics_every == 1 else b2**self.statistics_every

    def started(self, step: jax.Array) -> jax.Array:
        """Whether the results are used."""
        return step >= self.first if math.isfinite(self.first) else jnp.zeros([], bool)

    def follows(self, step: jax.Array, phase: Any) -> jax.Array:
        """Whether a phase is refreshed at this step, if the first step has set all phases."""
        return (step > 1) & ((step - 1 + phase) % self.every == 0)

    def due(self, step: jax.Array, phase: Any) -> jax.Array:
        """Whether a phase is refreshed at this step."""
        if math.isinf(self.first):
            return jnp.zeros([], bool)
        first = int(self.first)
        if self.phases == 1:
            return (step == first) | ((step >= first) & (step % self.every == 0))
        return (step > first - self.every) & ((step + phase) % self.every == 0)


REFRESH = Refresh()


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
      max_elements: bound on the elements processed at once, see `largest_chunk`.
      need: refresh only those due ones that need it.
    """
    given, units = units, [unit.flat for unit in units]
    carries = [unit.carry for unit in units]
    parts = [unit.layers if phases > 1 else 1 for unit in given]
    costs = [unit.cost / n for unit, n in zip(units, parts, strict=True) for _ in range(n)]
    dealt = iter(phases_of(costs, phases))
    groups: dict[tuple[int, Hashable], list[int]] = {}
    busy = jnp.zeros([], bool)
    for at, count in enumerate(parts):
        own = [next(dealt) for _ in range(count)]
        if count == 1:
            groups.setdefault((own[0], units[at].likeness), []).append(at)
            continue
        work = functools.partial(
            _refreshed, function=function, max_elements=max_elements, need=need
        )
        flags = due(jnp.asarray(own, jnp.int32))
        busy, carry = _layer_by_layer(given[at], flags, busy, work)
        carries[at] = given[at]._replace(carry=carry).flat.carry
    for (phase, _), members in groups.items():
        refresh = functools.partial(
            _refreshed,
            [units[at] for at in members],
            function=function,
            max_elements=max_elements,
            need=need,
        )
        # One group after the other, since XLA would run independent groups in parallel, and LAPACK's
        # threads then deadlock (jax #39292).
        busy, found = once(due(phase) & ~busy, refresh, [carries[at] for at in members])
        for at, carry in zip(members, found, strict=True):
            carries[at] = carry
    return [unit.like(carry) for unit, carry in zip(given, carries, strict=True)]


def _refreshed(
    units: Sequence[Unit],
    carries: Sequence[Any],
    *,
    function: Callable[[Hashable, Any, Any], Any],
    max_elements: int | None,
    need: Need | None,
) -> list[Any]:
    if need is None or not sum(unit.blocks for unit in units):
        return worked_on(units, function, max_elements, carries)
    flags = in_need(units, carries, need, max_elements)
    flagged = [
        unit._replace(source=(unit.source, each)) for unit, each in zip(units, flags, strict=True)
    ]
    return worked_on(flagged, only_those(function), max_elements, carries)


def _layer_by_layer(
    unit: Unit,
    due: jax.Array,
    busy: jax.Array,
    work: Callable[[Sequence[Unit], Sequence[Any]], list[Any]],
) -> tuple[jax.Array, Any]:
    """A unit's carry, with the layers that are due `[layers]` replaced in place, one by one."""
    count = unit.blocks
    first = jax.lax.axis_index(unit.layer_names) * count if unit.layer_names else 0
    ours = part_of(jnp.broadcast_to(due, unit.layers), first, count)

    def one(at: Any, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        busy, carry = state

        def refresh(carry: Any) -> Any:
            layer = lambda tree: jax.tree.map(lambda x: row_major(part_of(x, at, 1)), tree)
            part = unit._replace(source=layer(unit.source), carry=layer(carry))
            (new,) = work([part.flat], [part.flat.carry])
            return jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0),
                carry,
                part.like(new),
            )

        return once(ours[at] & ~busy, refresh, carry)

    return jax.lax.fori_loop(0, count, one, (busy, unit.carry))


def phases_of(costs: Sequence[float], phases: int) -> list[int]:
    """A phase for every unit that stays whole, largest units first, each to the emptiest phase.

    Example:
      >>> from ravine.optimizers.matrix.batch.refresh import phases_of
      >>> phases_of([1.0, 3.0, 2.0], 2)
      [1, 0, 1]
    """
    loads, found = [0.0] * phases, [0] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
        found[at] = min(range(phases), key=loads.__getitem__)
        loads[found[at]] += costs[at]
    return found
