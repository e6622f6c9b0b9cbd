"""When costly quantities are recomputed, and how that is done in place.

Roots and eigenbases are refreshed every T steps: all on one step, or *staggered*, a T-th of them on
every step, so that all steps take the same time. Both are the same program: matrices are dealt to
phases, and a phase is a loop that runs once or not at all. A loop, because XLA updates what it carries
in place, where a conditional would copy every buffer on the steps on which nothing happens.
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
from .by_need import Need, in_need, only_those
from .once import once
from .together import Unit, worked_on


@options("refresh")
class Refresh:
    r"""When roots and bases are found again; steps are counted from one.

    Attributes:
      every: the period T.
      start: the first step that uses the results, at least T (so that staggered ones are complete);
        ``None`` takes T, and infinity never starts.
      staggered: spread over the period.
      statistics_every: statistics learn from the gradients of the first step and of every k-th, k at
        most T, at the decay rate :math:`\beta^k`: so their mean reaches as many steps back. A sum
        (Shampoo's ``b2=1``) counts such a gradient k times.
      need: if given, a block that is due is refreshed only if what was found no longer fits its
        statistics: if the misfit is larger than this. Of a basis it is the part of
        :math:`Q^\top L Q` off the diagonal, :math:`\lVert\cdot\rVert_F`, of the whole; of a root the
        largest element of :math:`L X^p - I`. Take a short period with it.
      most: with `need`, at most this share of the blocks of a shape is refreshed in one step, the worst
        first; of each device's blocks on a mesh, of each phase's if staggered. Not before the start,
        so that no block starts without.

    Raises:
      ValueError: for a period below one, a start before the first refresh, statistics that learn more
        rarely than something is found from them, or a bound on needs that nobody asks for.

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
        """On how many steps of a period something is refreshed."""
        return self.every if self.staggered and self.every > 1 else 1

    @property
    def words(self) -> str:
        """For explanations: what else than the default happens, after a comma."""
        k, share = self.statistics_every, "" if self.most == 1 else f", at most {self.most:.3g}"
        statistics = "" if k == 1 else f", statistics every {k}"
        return statistics + (
            "" if self.need is None else f", refreshed if off by {self.need:.3g}{share}"
        )

    def check_at_once(self, name: str) -> None:
        """Raises for a start, where results are used as soon as there are any."""
        if self.start is not None:
            raise ValueError(
                f"refresh.start is not for {name}, whose bases are found on the first step and used "
                f"from the second; leave it out, got {self.start!r}."
            )

    def by_need(
        self, step: jax.Array, misfit: Callable[[Hashable, Any, Any], jax.Array]
    ) -> Need | None:
        """What of that which is due is refreshed; None for all of it."""
        if self.need is None:
            return None
        return Need(misfit, self.need, self.most, bounded=step > self.first)

    def learning(self, step: jax.Array) -> jax.Array | None:
        """Whether statistics learn from this step's gradient, None where they always do.

        On the first step, and then so that a refresh at the end of a period knows its last gradient.
        """
        k = self.statistics_every
        return None if k == 1 else (step == 1) | (step % k == 0)

    def learned(self, step: jax.Array) -> jax.Array:
        """How many gradients statistics have in them, by `learning`."""
        k = self.statistics_every
        return step if k == 1 else step // k + 1

    def learning_from_first(self, step: jax.Array) -> jax.Array | None:
        """As `learning`, where the first step sets all, and periods are counted from it (`follows`)."""
        k = self.statistics_every
        return None if k == 1 else (step - 1) % k == 0

    def decay(self, b2: Any) -> Any:
        """A decay rate a step, as one for every gradient that statistics learn from."""
        return b2 if self.statistics_every == 1 else b2**self.statistics_every

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


REFRESH = Refresh()


def refreshed(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    phases: int,
    due: Callable[[int], jax.Array],
    max_elements: int | None = None,
    need: Need | None = None,
) -> list[Any]:
    """The units' carries, those that are due replaced by ``function(kind, carry, source)``.

    Units stay whole, so that what is refreshed when does not depend on how a mesh cuts them. The
    function gets arrays with one batch axis.

    Args:
      units: what there is.
      function: of joined carries and sources, to such carries.
      phases: among how many the units are dealt.
      due: whether a phase is refreshed now.
      max_elements: bound on the elements worked on at once, see `largest_chunk`.
      need: of those that are due, only the ones that need it.
    """
    given, units = units, [unit.flat for unit in units]
    carries = [unit.carry for unit in units]
    groups: dict[tuple[int, Hashable], list[int]] = {}
    for at, phase in enumerate(phases_of([unit.cost for unit in units], phases)):
        groups.setdefault((phase, units[at].likeness), []).append(at)
    busy = jnp.zeros([], bool)
    for (phase, _), members in groups.items():
        refresh = functools.partial(
            _refreshed, [units[at] for at in members], function, max_elements, need
        )
        # One group after the other, as XLA would run side by side what does not depend on each other,
        # and LAPACK's threads do not bear it (jax #39292).
        busy, found = once(due(phase) & ~busy, refresh, [carries[at] for at in members])
        for at, carry in zip(members, found, strict=True):
            carries[at] = carry
    return [unit.like(carry) for unit, carry in zip(given, carries, strict=True)]


def _refreshed(
    units: Sequence[Unit],
    function: Callable[[Hashable, Any, Any], Any],
    max_elements: int | None,
    need: Need | None,
    carries: Sequence[Any],
) -> list[Any]:
    if need is None or not sum(unit.blocks for unit in units):
        return worked_on(units, function, max_elements, carries)
    flags = in_need(units, carries, need, max_elements)
    flagged = [
        unit._replace(source=(unit.source, each)) for unit, each in zip(units, flags, strict=True)
    ]
    return worked_on(flagged, only_those(function), max_elements, carries)


def phases_of(costs: Sequence[float], phases: int) -> list[int]:
    """A phase for every unit that stays whole, the largest units first to where there is least.

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
