"""When expensive quantities are recomputed: the clock, and beside it the need.

Roots and eigenbases are refreshed every T steps: all on one step, or *staggered*, a T-th of them on
every step, so that all steps take the same time. How it is done is in `phases`.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from ....core.checks import check_known, check_positive, check_whole
from ....core.kinds import MaybeInfinite
from ....core.options import options


@dataclasses.dataclass(frozen=True)
class Need:
    """The criterion that decides whether a matrix is refreshed."""

    misfit: Callable[[Hashable, Any, Any], jax.Array]
    """From a kind, carries and sources to one number for each member of the batch."""
    above: float
    """Members with a larger misfit need a refresh."""
    most: float = 1.0
    """At most this share of the matrices that are ranked together is refreshed, rounded up, worst
    first."""
    bounded: jax.Array | bool = True
    """Whether that bound applies yet."""
    every: jax.Array | bool = False
    """Whether all are refreshed, whatever their misfit."""


@options("refresh")
class Refresh:
    r"""When roots and bases are recomputed; steps are counted from one.

    Attributes:
      every: the period T.
      start: the first step that uses the results, at least T (so that staggered ones are complete);
        ``None`` takes T; with infinity they are never used.
      staggered: spread the work over the period.
      statistics_every: the gradient of every k-th step updates the statistics, k at most T, with the
        decay rate :math:`\beta^k`, so that their mean covers the same number of steps. Shampoo takes
        steps 1, k, 2k and so on; SOAP and KL-Shampoo, which find bases on the first step, 1, k + 1,
        2k + 1. A sum (Shampoo's ``b2=1``) counts each of these gradients k times, the first too.
      need: if given, a block that is due is refreshed only if its root or basis no longer fits its
        statistics: if the misfit is larger than this. For a basis it is the fraction of
        :math:`Q^\top L Q` off the diagonal, in :math:`\lVert\cdot\rVert_F`; for a root, the largest
        element of :math:`(L + \rho I)^q X^p - I`, where X should be :math:`(L + \rho I)^{-q/p}`. Combine
        it with a short period.
      most: with `need`, at most this share of the blocks of a shape is refreshed in one step, worst
        first; on a mesh, of each device's blocks, apart by the mesh axes that cut their leaf; and if
        staggered, of each phase's, leaves of scanned layers apart. It does not apply before the start,
        so that no block starts without a root or basis.

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
        self,
        step: jax.Array,
        misfit: Callable[[Hashable, Any, Any], jax.Array],
        every: jax.Array | bool = False,
    ) -> Need | None:
        """The need that selects which due blocks are refreshed; None for all."""
        if self.need is None:
            return None
        return Need(misfit, self.need, self.most, step > self.first, every)

    def learning(self, step: jax.Array) -> jax.Array | None:
        """Whether this step's gradient updates the statistics, None for always.

        True on steps 1, k, 2k, so that a refresh at the end of a period includes its last gradient if
        k divides the period and nothing is staggered.
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
