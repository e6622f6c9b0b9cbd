"""Operators: schedules made of schedules."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import LARGEST_COUNT, check_name, check_ratio, check_whole
from ._arithmetic import between, half_cosine, progress, raised, rounded, times
from ._checks import check_boundaries, check_length
from ._schedule import Schedule, boundaries_of, evaluate, value_at, words_of
from .shapes import decay

MOST_MARKS = 64  # boundaries that a schedule tells, of those it repeats
RAMPS: dict[str, Callable[[jax.Array], jax.Array]] = {  # what is left to climb
    "linear": lambda x: 1.0 - x,
    "cosine": half_cosine,
    "1-sqrt": lambda x: jnp.sqrt(1.0 - x),
}


@checked
def ramp(start: float, end: float, steps: int, shape: str = "linear") -> Schedule:
    r"""From one value to another, up or down, with :math:`x = \min(t / T, 1)`.

    .. math:: v_t = a (1 - x) + b x

    Args:
      start: :math:`a`, the value at count 0.
      end: :math:`b`, the value from count `steps` on.
      steps: :math:`T`, at least 1.
      shape: ``"linear"``; ``"cosine"``, by :math:`\tfrac{1}{2} (1 - \cos \pi x)`; ``"1-sqrt"``,
        by :math:`1 - \sqrt{1 - x}`; ``"exponential"``, :math:`a^{1 - x} b^x`.

    Raises:
      ValueError: for an unknown shape, no steps, and an exponential that starts or ends at zero.

    Example:
      >>> import ravine
      >>> momentum = ravine.schedules.ramp(0.85, 0.95, 400)
      >>> [round(float(momentum(t)), 3) for t in (0, 200, 400)]
      [0.85, 0.9, 0.95]
    """
    check_whole(1, steps=steps)
    check_name("ramp shape", shape, [*RAMPS, "exponential"])
    if shape == "exponential":
        if not (start > 0 and end > 0):
            raise ValueError(
                f"an exponential ramp needs both ends above zero, got {start!r} and {end!r}."
            )

        def function(count: jax.Array) -> jax.Array:
            value = times(raised(end / start, progress(count, steps)), start)
            return jnp.where(count >= steps, np.float32(end), value)
    else:
        left = RAMPS[shape]

        def function(count: jax.Array) -> jax.Array:
            return between(start, end, left(progress(count, steps)))

    return Schedule(function, f"{shape} ramp", (0, steps))


@checked
def warmup(
    body: optax.Schedule,
    steps: int,
    *,
    shape: str = "linear",
    from_zero: bool = False,
    start_ratio: float = 0.0,
) -> Schedule:
    r"""A ramp over `steps` updates to the value at which `body` starts.

    .. math:: \eta_t = f(\tfrac{t + 1}{W}) \, \mathrm{body}(0) \quad (t < W), \qquad
        \eta_t = \mathrm{body}(t - W) \quad (t \ge W)

    Args:
      body: a schedule, counted from the end of the ramp.
      steps: :math:`W`, the length of the ramp in updates; 0 means none.
      shape: :math:`f`, as in :func:`ramp`, from `start_ratio` to 1.
      from_zero: ramp by :math:`t / W` instead, whose first update does nothing (Optax, Hugging
        Face).
      start_ratio: the share of the level at which the ramp starts, in [0, 1]; ``"exponential"``
        needs it above 0.

    Raises:
      ValueError: if `steps` is not a whole number of at least 0, or the shape is unknown.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.warmup(ravine.schedules.linear(1.0, 2), 2)
      >>> [float(schedule(t)) for t in range(5)]
      [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    check_whole(0, steps=steps)
    check_ratio(start_ratio=start_ratio)
    check_name("ramp shape", shape, [*RAMPS, "exponential"])
    if shape == "exponential" and start_ratio == 0:
        raise ValueError("an exponential warm-up cannot start at zero; give start_ratio, say 0.01.")
    if steps == 0:
        return shift(body, 0)
    level = value_at(body, 0)
    rise = ramp(start_ratio * level, level, steps, shape)
    if not from_zero:
        rise = shift(rise, -1)
    joined = join([rise, body], [steps])
    return Schedule(joined.function, f"{shape} warm-up, then {words_of(body)}", joined.boundaries)


@checked
def join(schedules: Sequence[optax.Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another, each counted from the boundary at which it begins.

    Args:
      schedules: at least one.
      boundaries: the counts at which the second and all later ones begin, rising.

    Raises:
      ValueError: for unsorted boundaries or a list of the wrong length.

    Source: the same as ``optax.join_schedules``.

    Example:
      >>> import ravine
      >>> from ravine.schedules import constant, linear
      >>> schedule = ravine.schedules.join([constant(1.0), linear(1.0, 2)], [3])
      >>> [float(schedule(t)) for t in range(6)]
      [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    schedules, bounds = tuple(schedules), check_boundaries(boundaries)
    if not schedules:
        raise ValueError("nothing to join; give at least one schedule.")
    check_length("boundaries", bounds, len(schedules) - 1, "one less than there are schedules")

    def function(count: jax.Array) -> jax.Array:
        value = evaluate(schedules[0], count)
        for boundary, schedule in zip(bounds, schedules[1:], strict=True):
            later = evaluate(schedule, jnp.maximum(count - boundary, 0))
            value = jnp.where(count >= boundary, later, value)
        return value

    starts, ends = (0, *bounds), (*bounds, None)
    marks = {
        start + mark
        for start, end, schedule in zip(starts, ends, schedules, strict=True)
        for mark in boundaries_of(schedule)
        if end is None or start + mark < end
    }
    words = ", then ".join(map(words_of, schedules))
    return Schedule(function, words, tuple(sorted(marks | set(starts))))


@checked
def product(*schedules: optax.Schedule) -> Schedule:
    """Schedules multiplied with each other, all on the same count.

    Args:
      schedules: at least one; warm-up, body and cooldown, say.

    Raises:
      ValueError: if there is none.

    Source: the composition of google-research/big_vision.

    Example:
      >>> import ravine
      >>> from ravine.schedules import inverse_sqrt, linear, product
      >>> round(float(product(inverse_sqrt(1.0, 3), linear(1.0, 10))(9)), 3)
      0.05
    """
    if not schedules:
        raise ValueError("nothing to multiply; give at least one schedule.")

    def function(count: jax.Array) -> jax.Array:
        value = evaluate(schedules[0], count)
        for schedule in schedules[1:]:
            value = rounded(value * evaluate(schedule, count))
        return value

    marks = sorted({mark for schedule in schedules for mark in boundaries_of(schedule)})
    return Schedule(function, " times ".join(map(words_of, schedules)), tuple(marks))


@checked
def anneal_from(
    schedule: optax.Schedule,
    step: int,
    duration: int,
    shape: str = "1-sqrt",
    end_ratio: float = 0.0,
) -> Schedule:
    """Branches a decay off any run.

    The schedule up to `step`, then a decay from the value it has there, whatever it would have
    done.

    Args:
      schedule: the run so far.
      step: the count at which the decay begins; 0 decays from the start.
      duration: updates of the decay, at least 1.
      shape: of the decay, see :func:`decay`.
      end_ratio: the share, of the value at `step`, that the decay ends at.

    Raises:
      ValueError: for values out of range or an unknown shape.

    Source: cooldowns from any checkpoint: Hägele et al., 2024, https://arxiv.org/abs/2405.18392;
    ``override_decay`` of allenai/OLMo-core.

    Example:
      >>> import ravine
      >>> from ravine.schedules import anneal_from, cosine
      >>> branch = anneal_from(cosine(1.0, 100), 50, 10, "linear")
      >>> [round(float(branch(t)), 3) for t in (0, 50, 55, 60)]
      [1.0, 0.5, 0.25, 0.0]
    """
    check_whole(0, step=step)
    check_whole(1, duration=duration)
    tail = decay(value_at(schedule, step), duration, shape, end_ratio)
    return _branch(schedule, step, tail)


@checked
def rewarm(schedule: optax.Schedule, step: int, duration: int, then: optax.Schedule) -> Schedule:
    """Continues a run on new data.

    The schedule up to `step`, then a line over `duration` updates from the value it has there to
    the value at which `then` starts, then `then`.

    Args:
      schedule: the run so far.
      step: the count at which the ramp begins.
      duration: updates of the ramp; 0 means none.
      then: the schedule that follows, counted from the end of the ramp.

    Raises:
      ValueError: for values out of range.

    Source: Ibrahim et al., 2024, https://arxiv.org/abs/2403.08763.

    Example:
      >>> import ravine
      >>> from ravine.schedules import cosine, linear, rewarm
      >>> schedule = rewarm(linear(1.0, 8), 8, 2, cosine(0.5, 10))
      >>> [float(schedule(t)) for t in (7, 8, 9, 10)]
      [0.125, 0.0, 0.25, 0.5]
    """
    check_whole(0, step=step, duration=duration)
    if duration:
        rise = ramp(value_at(schedule, step), value_at(then, 0), duration)
        then = join([rise, then], [duration])
    return _branch(schedule, step, then)


def _branch(schedule: optax.Schedule, step: int, tail: optax.Schedule) -> Schedule:
    return join([schedule, tail], [step]) if step else shift(tail, 0)


@checked
def shift(schedule: optax.Schedule, by: int) -> Schedule:
    """The schedule `by` updates later, holding its first value until then.

    Args:
      schedule: any schedule.
      by: updates; a negative number skips as many of the schedule's counts.

    Raises:
      ValueError: if `by` is not a whole number.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.shift(ravine.schedules.linear(1.0, 2), 1)(t)) for t in range(4)]
      [1.0, 1.0, 0.5, 0.0]
    """
    check_whole(-LARGEST_COUNT, by=by)
    marks = {0, *(mark + by for mark in boundaries_of(schedule) if mark + by > 0)}

    def function(count: jax.Array) -> jax.Array:
        if by < 0:  # a sum beyond the largest count would wrap around
            count = jnp.minimum(count, int(jnp.iinfo(count.dtype).max) + by)
        return evaluate(schedule, jnp.maximum(count - by, 0))

    return Schedule(function, words_of(schedule), tuple(sorted(marks)))


@checked
def repeat(schedule: optax.Schedule, period: int, times: int | None = None) -> Schedule:
    """The first `period` counts of a schedule, again and again.

    Args:
      schedule: any schedule; what it does from count `period` on is not used, but for the end.
      period: updates of one turn, at least 1.
      times: turns; after them the value stays at ``schedule(period)``. ``None`` never ends.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import ravine
      >>> again = ravine.schedules.repeat(ravine.schedules.linear(1.0, 2), 2, times=2)
      >>> [float(again(t)) for t in range(6)]
      [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    check_whole(1, period=period)
    if times is not None:
        check_whole(1, times=times)
        if times * period > LARGEST_COUNT:
            raise ValueError(
                f"times must be at most {LARGEST_COUNT // period} with a period of {period}, as updates "
                f"are counted in int32, got {times}; None never ends."
            )

    def function(count: jax.Array) -> jax.Array:
        within = jnp.remainder(count, period)
        if times is not None:
            within = jnp.where(count >= times * period, period, within)
        return evaluate(schedule, within)

    turns = range(3) if times is None else sorted({*range(min(times, MOST_MARKS)), times})
    marks = tuple(turn * period for turn in turns)
    count = "for ever" if times is None else f"{times} times"
    return Schedule(function, f"{words_of(schedule)} every {period} updates, {count}", marks)
