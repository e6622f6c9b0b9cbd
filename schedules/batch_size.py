"""Batch sizes that change during a run, with exact offsets into the data."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import LARGEST_COUNT, check_amount, check_ratio, check_whole
from ._arithmetic import LARGEST_DIVISOR, multiplied_and_divided, rounded, select, times
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

    def at(self, count: int) -> int:
        """The batch size of the update that is made at `count`, a Python integer."""
        check_whole(0, count=count)
        return self.sizes[bisect.bisect_right(self.boundaries, count)]

    def phases(self, until: int) -> tuple[tuple[int, int], ...]:
        """Every batch size with the number of its updates before the count `until`.

        Example:
          >>> from ravine.schedules import BatchSizes
          >>> BatchSizes((4, 8, 16), (10, 15)).phases(12)
          ((4, 10), (8, 2))
        """
        check_whole(0, until=until)
        ends = [min(end, until) for end in (*self.boundaries, until)]
        counts = [end - start for start, end in itertools.pairwise((0, *ends))]
        pairs = zip(self.sizes, counts, strict=True)
        return tuple((size, count) for size, count in pairs if count)

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

    def batches_at(self, count: Any, batch_size: int) -> tuple[jax.Array, jax.Array, int]:
        """The data before the update at `count`, in batches of a constant size, in int32 throughout.

        Args:
          count: updates made.
          batch_size: examples per constant batch.

        Returns:
          The whole batches, the parts of a batch left over, and how many of these make a batch. Where
          there are more than int32 counts, 2**31 - 2 and 0.

        Raises:
          ValueError: for a batch of more parts than the arithmetic is exact for, or growing batches that
            see more than int32 counts before the last of them.
        """
        check_whole(1, batch_size=batch_size)
        part = math.gcd(self.tick, batch_size)
        per_batch = batch_size // part
        if per_batch > LARGEST_DIVISOR:
            raise ValueError(
                f"batch_size {batch_size} and the batch sizes {self.sizes} have no common divisor above "
                f"{part}, and parts of a batch are counted up to {LARGEST_DIVISOR}; choose sizes with a "
                "larger one."
            )
        starts = [divmod(start // part, per_batch) for start in self._starts()]
        if starts[-1][0] >= LARGEST_COUNT:
            raise ValueError(
                f"the batch sizes grow over {self._starts()[-1]} examples, which is {starts[-1][0]} "
                f"times {batch_size}, more than int32 counts; let them grow earlier, or count in larger "
                "batches."
            )
        count = as_count(count)
        beyond = min(self.count_at((LARGEST_COUNT - 1) * batch_size), LARGEST_COUNT)
        inside = jnp.minimum(count, beyond - 1).astype(jnp.int32)
        of_phase = lambda table: select(inside, self.boundaries, table, jnp.int32)
        since = inside - of_phase((0, *self.boundaries))
        speeds = [divmod(size // part, per_batch) for size in self.sizes]
        carried, rest = multiplied_and_divided(
            since,
            of_phase([fraction for _, fraction in speeds]),
            of_phase([rest for _, rest in starts]),
            per_batch,
        )
        whole = of_phase([whole for whole, _ in starts])
        whole += since * of_phase([each for each, _ in speeds]) + carried
        is_beyond = count >= beyond
        return (
            jnp.where(is_beyond, LARGEST_COUNT - 1, whole),
            jnp.where(is_beyond, 0, rest),
            per_batch,
        )


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
def follow_data(
    schedule: optax.Schedule, batch: BatchSizes, batch_size: int | None = None
) -> Schedule:
    """A schedule whose clock is the data: a larger batch moves it faster.

    Between two of its counts, the schedule is interpolated linearly.

    Args:
      schedule: counted in updates of a constant batch.
      batch: the batch sizes.
      batch_size: the size of the constant batch; by default ``batch.tick`` examples, the unit in which
        ``Run.ticks`` gives durations.

    Raises:
      ValueError: when batch sizes grow for more data than int32 counts, or have no common divisor that
        makes the interpolation exact.

    Example:
      >>> import ravine
      >>> from ravine.schedules import BatchSizes, follow_data, linear
      >>> schedule = follow_data(linear(1.0, 8), BatchSizes((4, 8), (4,)))
      >>> [float(schedule(count)) for count in (0, 4, 5, 6)]
      [1.0, 0.5, 0.25, 0.0]
    """
    size = batch.tick if batch_size is None else batch_size
    batch.batches_at(0, size)

    def function(count: jax.Array) -> jax.Array:
        at, rest, per_batch = batch.batches_at(count, size)
        before = evaluate(schedule, at)
        if per_batch == 1:
            return before
        share = times(rest.astype(jnp.float32), 1 / per_batch)
        between = before + rounded((evaluate(schedule, at + 1) - before) * share)
        return jnp.where(rest == 0, before, between)

    marks = {batch.count_at(mark * size) for mark in boundaries_of(schedule)}
    words = f"{words_of(schedule)}, by data seen"
    return Schedule(function, words, tuple(sorted({0, *batch.boundaries, *marks})))


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
    while batch_size / factor ** len(cuts) <= LARGEST_COUNT:
        if len(cuts) == MOST_STAGES:
            raise ValueError(
                f"factor {factor} cuts the schedule more than {MOST_STAGES} times; give a smaller one."
            )
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
        rest = follow_data(schedule, batch, batch_size)
        later = tuple(mark - last for mark in rest.boundaries if mark >= last)
        tail = Schedule(lambda count: times(rest(count + last), grown), rest.words, later)
        rate = join([rate, tail], [last]) if last else tail
    return dataclasses.replace(rate, words=f"Seesaw of {words_of(schedule)}"), batch
