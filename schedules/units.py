"""Durations with explicit units, resolved once."""

import dataclasses
import math

from ..core.arguments import checked
from ..core.checks import check_amount, check_name, check_ratio, check_whole, number
from .batch_size import BatchSizes

UNITS = ("steps", "tokens", "examples", "fraction")


@checked
@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount and its unit, made by :func:`steps`, :func:`tokens`, :func:`examples`, :func:`fraction`.

    Attributes:
      amount: a whole number, or for a fraction a number in [0, 1].
      unit: ``"steps"``, ``"tokens"``, ``"examples"`` or ``"fraction"``.

    Raises:
      ValueError: for an unknown unit or an invalid amount.

    Example:
      >>> import ravine
      >>> ravine.schedules.fraction(0.2)
      Duration(amount=0.2, unit='fraction')
    """

    amount: float
    unit: str

    def __post_init__(self) -> None:
        check_name("unit", self.unit, UNITS)
        if self.unit == "fraction":
            check_ratio(**{"amount of a fraction": self.amount})
            return
        amount = number("amount", self.amount)
        if isinstance(amount, float) and amount.is_integer():  # 1e9 tokens
            object.__setattr__(self, "amount", int(amount))
        check_amount(0, **{f"amount of {self.unit}": self.amount})


@checked
def steps(amount: float) -> Duration:
    """A number of updates.

    Example:
      >>> import ravine
      >>> ravine.schedules.steps(100).unit
      'steps'
    """
    return Duration(amount, "steps")


@checked
def tokens(amount: float) -> Duration:
    """A number of tokens.

    Example:
      >>> import ravine
      >>> ravine.schedules.tokens(1e9)
      Duration(amount=1000000000, unit='tokens')
    """
    return Duration(amount, "tokens")


@checked
def examples(amount: float) -> Duration:
    """A number of examples, that is, of sequences.

    Example:
      >>> import ravine
      >>> ravine.schedules.examples(4096).amount
      4096
    """
    return Duration(amount, "examples")


@checked
def fraction(amount: float) -> Duration:
    """A share of the run's updates (of its data, where durations are asked for in ticks).

    Example:
      >>> import ravine
      >>> ravine.schedules.fraction(0.1).amount
      0.1
    """
    return Duration(amount, "fraction")


@checked
@dataclasses.dataclass(frozen=True)
class Run:
    """The run that durations refer to.

    Attributes:
      length: how long the run is, in steps, tokens or examples.
      batch: the batch size, a number or one that changes.
      context: tokens per example; 0 if no duration is in tokens.

    Raises:
      ValueError: for a length that is a fraction, or tokens without a context.

    Example:
      >>> import ravine
      >>> from ravine.schedules import Run, fraction, tokens
      >>> run = Run(tokens(1_000_000), batch=8, context=1000)
      >>> run.steps, run.count(fraction(0.2)), run.count(tokens(20_000))
      (125, 25, 3)
    """

    length: Duration
    batch: BatchSizes | int
    context: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.length, Duration) or self.length.unit == "fraction":
            raise ValueError(
                f"length must be steps(...), tokens(...) or examples(...), got {self.length!r}."
            )
        check_whole(0, context=self.context)
        if not isinstance(self.batch, BatchSizes):
            check_whole(1, batch=self.batch)
            object.__setattr__(self, "batch", BatchSizes((self.batch,)))
        check_whole(1, steps=self.steps)

    @property
    def _batch(self) -> BatchSizes:
        assert isinstance(self.batch, BatchSizes)
        return self.batch

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.count(self.length)

    def count(self, duration: Duration, start: int = 0) -> int:
        """A duration in updates, rounded up; with a growing batch it depends on where it starts.

        Args:
          duration: any duration.
          start: the count at which it begins.

        Raises:
          ValueError: for anything but a duration, since a bare number could be in any unit.
        """
        self._check(duration)
        if duration.unit == "steps":
            return int(duration.amount)
        if duration.unit == "fraction":
            return round(duration.amount * self.steps)
        before = self._batch.data_offset(start)
        return self._batch.count_at(before + self._examples(duration)) - start

    def ticks(self, duration: Duration) -> int:
        """A duration from the start of the run in ticks of the batch, for :func:`follow_data`."""
        self._check(duration)
        if duration.unit == "steps":
            return self._batch.data_offset(int(duration.amount)) // self._batch.tick
        if duration.unit == "fraction":
            return round(duration.amount * self.ticks(self.length))
        return math.ceil(self._examples(duration) / self._batch.tick)

    def _check(self, duration: Duration) -> None:
        if not isinstance(duration, Duration):
            raise ValueError(
                f"{duration!r} has no unit; write steps({duration!r}), tokens(...), examples(...) "
                "or fraction(...)."
            )

    def _examples(self, duration: Duration) -> int:
        if duration.unit == "examples":
            return int(duration.amount)
        if not self.context:
            raise ValueError("a duration in tokens needs the context, the tokens per example.")
        return -(-int(duration.amount) // self.context)
