"""Batch sizes that change during a run, with exact offsets into the data."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import LARGEST_COUNT, check_amount, check_ratio, check_whole
from ._arithmetic import rounded, select, times
from ._checks import check_boundaries, check_length
from ._schedule import Schedule, as_count, boundaries_of, evaluate, values_of, words_of
from .operators import join
from .piecewise import piecewise

MOST_STAGES = 1000


@checked
@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """A batch size for every count, looked up right-continuously.

    Attributes:
      sizes: examples per update, phase by phase, over all hosts.
      boundaries: the counts at which the second and all later phases begin, rising.

    Raises:
      ValueError: for sizes below 1, unsorted boundaries or lists of the wrong length.

    Example:
      >>> import ravine
      >>> batch = ravine.schedules.BatchSizes((4, 8), (10,))
      >>> [int(batch(count)) for count in (0, 9, 10)]
      [4, 4, 8]
      >>> batch.data_offset(12), batch.count_at(41)
      (56, 11)
    """

    sizes: tuple[int, ...]
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "boundaries", check_boundaries(self.boundaries))
        for size in self.sizes:
            check_whole(1, sizes=size)
        check_length("sizes", self.sizes, len(self.boundaries) + 1, "one more than boundaries")

    def __call__(self, count: Any) -> jax.Array:
        """The batch size of the update that is made at `count`, int32."""
        return select(as_count(count), self.boundaries, self.sizes, jnp.int32)

    @property
    def tick(self) -> int:
        """Examples per tick; all batch sizes are multiples of it."""
        return math.gcd(*self.sizes)

    def _starts(self) -> list[int]:
        """The examples before each phase."""
        starts, before = [0], 0
        for size, boundary in zip(self.sizes, self.boundaries, strict=False):
            starts.append(starts[-1] + size * (boundary - before))
            before = boundary
        return starts

    def data_offset(self, count: int) -> int:
        """Examples seen before the update at `count`, a Python integer: where a resumed run reads."""
        check_whole(0, count=count)
        phase = bisect.bisect_right(self.boundaries, count)
        return self._starts()[phase] + self.sizes[phase] * (count - (0, *self.boundaries)[phase])

    def count_at(self, examples: int) -> int:
        """The first count at which at least so many examples have been seen."""
        check_amount(0, examples=examples)
        starts = self._starts()
        phase = max(bisect.bisect_left(starts, examples) - 1, 0)
        past = -(-(examples - starts[phase]) // self.sizes[phase])
        return (0, *self.boundaries)[phase] + past

    def ticks_at(self, count: Any) -> jax.Array:
        """Ticks before the update at `count`, int32."""
        count = as_count(count)
        starts = [start // self.tick for start in self._starts()]
        if starts[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"the ramp of batch sizes covers {starts[-1]} ticks of {self.tick} examples, more "
                "than int32 counts; choose sizes with a larger common divisor."
            )
        since = count - select(count, self.boundaries, (0, *self.boundaries), count.dtype)
        speeds = [size // self.tick for size in self.sizes]
        start = select(count, self.boundaries, starts, count.dtype)
        return start + since * select(count, self.boundaries, speeds, count.dtype)


def _of_stages(sizes: Sequence[int], starts: Sequence[int]) -> BatchSizes:
    """Batch sizes whose stages begin with the first update at or after so many examples.

    A stage that the previous update skips entirely is left out.
    """
    kept: list[tuple[int, int]] = [(0, sizes[0])]
    for start, size in zip(starts, sizes[1:], strict=True):
        so_far = BatchSizes(tuple(s for _, s in kept), tuple(c for c, _ in kept[1:]))
        count = so_far.count_at(start)
        if count == kept[-1][0]:
            kept[-1] = (count, size)
        elif size != kept[-1][1]:
            kept.append((count, size))
    return BatchSizes(tuple(s for _, s in kept), tuple(c for c, _ in kept[1:]))


@checked
def batch_ramp(start: int, end: int, increment: int, examples: int) -> BatchSizes:
    """From a small batch to a large one by equal increments, each for as many examples.

    Args:
      start: the first batch size.
      end: the last one.
      increment: what is added each time; it divides ``end - start``.
      examples: the examples over which the ramp takes place.

    Returns:
      Batch sizes; a stage begins with the first update after its share of the examples.

    Raises:
      ValueError: for values out of range or an increment that does not fit.

    Source: ``--rampup-batch-size`` of NVIDIA/Megatron-LM.

    Example:
      >>> import ravine
      >>> ravine.schedules.batch_ramp(4, 12, 4, examples=80)
      BatchSizes(sizes=(4, 8, 12), boundaries=(10, 15))
    """
    check_whole(1, start=start, end=end, increment=increment)
    check_amount(1, examples=examples)
    if examples // start > LARGEST_COUNT:
        raise ValueError(
            f"examples must be at most {LARGEST_COUNT * start} with a batch of {start}, as updates "
            f"are counted in int32, got {examples}."
        )
    if end < start or (end - start) % increment:
        raise ValueError(
            f"increment {increment} must divide the difference from start {start} to end {end}; choose "
            "a divisor of it."
        )
    if (end - start) // increment > MOST_STAGES:
        raise ValueError(
            f"increment {increment} makes a ramp of {(end - start) // increment} stages, more than "
            f"{MOST_STAGES}; give a larger one."
        )
    sizes = list(range(start, end + 1, increment))
    stages = len(sizes) - 1
    starts = [-(-examples * k // stages) for k in range(1, stages + 1)]
    return _of_stages(sizes, starts)


@checked
def follow_data(schedule: optax.Schedule, batch: BatchSizes) -> Schedule:
    """A schedule whose clock is the data: a larger batch moves it faster.

    Args:
      schedule: counted in ticks of `batch`, ``batch.tick`` examples each; :class:`Run` gives
        durations in ticks.
      batch: the batch sizes.

    Raises:
      ValueError: when the ramp of batch sizes is too long for int32.

    Example:
      >>> import ravine
      >>> from ravine.schedules import BatchSizes, follow_data, linear
      >>> schedule = follow_data(linear(1.0, 8), BatchSizes((4, 8), (4,)))
      >>> [float(schedule(count)) for count in (0, 4, 5, 6)]
      [1.0, 0.5, 0.25, 0.0]
    """
    batch.ticks_at(0)
    marks = {batch.count_at(mark * batch.tick) for mark in boundaries_of(schedule)}
    return Schedule(
        lambda count: evaluate(schedule, batch.ticks_at(count)),
        f"{words_of(schedule)}, by data seen",
        tuple(sorted({0, *marks})),
    )


def by_data(schedule: optax.Schedule, batch: BatchSizes, batch_size: int) -> Schedule:
    """A schedule counted in updates of a constant batch, at the data that growing ones have seen.

    Between two of its counts it is interpolated. `batch_size` is a multiple of ``batch.tick``.
    """
    per_update = batch_size // batch.tick

    def function(count: jax.Array) -> jax.Array:
        ticks = batch.ticks_at(count)
        at, part = ticks // per_update, ticks % per_update
        before, after = evaluate(schedule, at), evaluate(schedule, at + 1)
        share = times(part.astype(jnp.float32), 1 / per_update)
        return jnp.where(part == 0, before, before + rounded((after - before) * share))

    return Schedule(function, f"{words_of(schedule)}, by data seen", (0, *batch.boundaries))


@checked
def seesaw(
    schedule: optax.Schedule,
    steps: int,
    batch_size: int,
    factor: float = 0.5,
    *,
    largest: int | None = None,
) -> tuple[Schedule, BatchSizes]:
    r"""Trades the decay of the learning rate for growth of the batch.

    Where the schedule has fallen by another factor :math:`\alpha`, the learning rate is multiplied
    by :math:`\sqrt{\alpha}` and the batch by :math:`1 / \alpha`. The same data is seen in fewer
    updates: ``batch.count_at(steps * batch_size)`` of them, about 36 % fewer for a quarter of a
    cosine as :math:`\alpha` approaches 1.

    Args:
      schedule: the reference, in updates of the constant batch.
      steps: :math:`T`, the length of the reference run.
      batch_size: its batch size.
      factor: :math:`\alpha` in (0, 1).
      largest: no batch is larger, as the memory or the critical batch has it; from the last growth
        on, the learning rate falls as the reference does for the same data, times the square root
        of what the batch has grown by. By default the batch grows to the end.

    Returns:
      The learning rate and the batch sizes, counted in updates of the shorter run. Up to the peak
      the learning rate is that of the reference.

    Raises:
      ValueError: for values out of range.

    Source: Meterez et al., 2025, https://arxiv.org/abs/2510.14717. It holds while the batch stays
    below the critical one.

    Example:
      >>> import ravine
      >>> rate, batch = ravine.schedules.seesaw(ravine.schedules.linear(1.0, 16), 16, 4)
      >>> batch
      BatchSizes(sizes=(4, 8, 16, 64), boundaries=(8, 10, 11))
      >>> [round(float(rate(count)), 2) for count in (0, 8, 10, 11)]
      [1.0, 0.71, 0.5, 0.25]
    """
    check_whole(1, steps=steps, batch_size=batch_size)
    if largest is not None:
        check_whole(batch_size, largest=largest)
    check_ratio(factor=factor)
    if factor in (0, 1):
        raise ValueError(f"factor must lie between 0 and 1, got {factor!r}; the paper has 0.5.")
    values = values_of(schedule, steps)
    top = int(values.argmax())
    peak, after = float(values[top]), values[top:]
    cuts: list[int] = []
    bounded = False
    while len(cuts) < 64:
        level = factor ** (len(cuts) + 1)
        below = after <= peak * level * (1 + 1e-6)
        if not below.any():
            break
        if bounded := largest is not None and round(batch_size / level) > largest:
            break
        cuts.append(top + int(below.argmax()))
    sizes = [round(batch_size / factor**k) for k in range(len(cuts) + 1)]
    check_whole(1, **{"the last batch_size, grown by all cuts,": sizes[-1]})
    batch = _of_stages(sizes, [cut * batch_size for cut in cuts])
    # The square root of the actual growth of the batch, so that rounded sizes keep the balance.
    bounds = [boundary - top for boundary in batch.boundaries]
    falls = piecewise(peak, bounds, [math.sqrt(batch_size / size) for size in batch.sizes[1:]])
    rate = join([schedule, falls], [top]) if top else falls
    if bounded:
        last = batch.boundaries[-1] if batch.boundaries else top
        grown = math.sqrt(batch.sizes[-1] / batch_size)
        rest = by_data(schedule, batch, batch_size)
        tail = Schedule(lambda count: times(rest(count + last), grown), words_of(schedule))
        rate = join([rate, tail], [last]) if last else tail
    return dataclasses.replace(rate, words=f"Seesaw of {words_of(schedule)}"), batch
