"""Shapes that go up again: restarts, triangles, one cycle."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import checked
from ..core.checks import check_finite, check_name, check_positive, check_ratio, check_whole
from ._arithmetic import between, raised, rounded, select, times
from ._checks import check_fits
from ._schedule import Schedule
from .piecewise import piecewise

MOST_RESTARTS = 10_000
MOST_SELECTS = 64  # longer chains are slower than a remainder and a power


@checked
def restarts(first_period: int, period_factor: float, steps: int) -> tuple[int, ...]:
    r"""The counts below `steps` at which SGDR restarts.

    The k-th is :math:`T_0 (m^k - 1) / (m - 1)`, the sum of the periods before it, in exact
    arithmetic and rounded down.

    Args:
      first_period: :math:`T_0` in updates, at least 1.
      period_factor: :math:`m`, at least 1.
      steps: the length of the run.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import ravine
      >>> ravine.schedules.restarts(10, 1.5, 100)
      (10, 25, 47, 81)
    """
    check_whole(1, first_period=first_period, steps=steps)
    check_finite(period_factor=period_factor)
    if period_factor < 1:
        raise ValueError(f"period_factor must be at least 1, got {period_factor!r}.")
    counts = _endless(first_period, period_factor)
    return tuple(itertools.takewhile(lambda count: count < steps, counts))


def _endless(first_period: int, period_factor: float) -> Iterator[int]:
    factor, period, end = Fraction(str(period_factor)), Fraction(first_period), Fraction(0)
    for turn in itertools.count():
        if turn == MOST_RESTARTS:
            raise ValueError(
                f"first_period {first_period} makes more than {MOST_RESTARTS} restarts; raise it."
            )
        end += period
        period *= factor
        yield int(end)


@checked
def sgdr(
    peak: float,
    steps: int,
    end_ratio: float = 0.0,
    *,
    first_period: int | None = None,
    period_factor: float = 2.0,
    peak_factor: float = 1.0,
) -> Schedule:
    r"""Cosines with warm restarts.

    .. math::
        \eta_t = \eta \gamma^i \left(e + (1 - e) \tfrac{1}{2}
        (1 + \cos \tfrac{\pi (t - b_i)}{b_{i+1} - b_i})\right)
        \quad (b_i \le t < b_{i+1})

    By default three cycles fill the run, with boundaries at :math:`T (m^i - 1) / (m^3 - 1)`, rounded,
    so that the value at `steps` is the floor; a run too short for three has two, or one.

    With `first_period` the boundaries :math:`b_i` are those of :func:`restarts`. From count `steps` on
    the value stays: at the floor if a cycle ends there, otherwise where the last, incomplete cycle was
    cut off, which is near the peak just after a restart. Boundaries are integers known beforehand: a
    cycle found by a floating-point logarithm misses restarts.

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: the length of the run.
      end_ratio: :math:`e` in [0, 1], the floor of a cycle relative to its peak.
      first_period: :math:`T_0` in updates; by default such that three cycles fill the run, a seventh of
        it with factor 2.
      period_factor: :math:`m` of :func:`restarts`, at least 1.
      peak_factor: :math:`\gamma` in (0, 1], which multiplies the peak at every restart.

    Raises:
      ValueError: for values out of range or a first period longer than the run.

    Source: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.sgdr(1.0, 14, first_period=2, peak_factor=0.5)
      >>> [round(float(schedule(t)), 3) for t in (0, 1, 2, 4, 6, 14)]
      [1.0, 0.5, 0.5, 0.25, 0.25, 0.0]
      >>> ravine.schedules.sgdr(1.0, 240).boundaries
      (0, 34, 103, 240)
    """
    check_finite(peak=peak)
    check_whole(1, steps=steps)
    check_ratio(end_ratio=end_ratio, peak_factor=peak_factor)
    check_positive(peak_factor=peak_factor)
    if first_period is None:
        bounds, last = _filling(period_factor, steps), steps
        first = (*bounds, last)[0]
    else:
        check_whole(1, first_period=first_period)
        check_fits({"first_period": first_period}, steps)
        first, bounds = first_period, restarts(first_period, period_factor, steps)
        last = _next(first, period_factor, steps)

    def cycle(count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Updates since the restart, one over the period, and the peak."""
        if period_factor == 1 and len(bounds) > MOST_SELECTS:
            turn = jnp.minimum(count // first, len(bounds))
            # An exponential of the logarithm costs half a power, and turns are few.
            fallen = jnp.exp(times(turn.astype(jnp.float32), math.log(peak_factor)))
            peaks = times(fallen, peak)
            return count - turn * first, jnp.float32(1) / jnp.float32(first), peaks
        starts = (0, *bounds)
        over = [1.0 / (b - a) for a, b in itertools.pairwise((*starts, last))]
        peaks = [peak * peak_factor**i for i in range(len(starts))]
        return (
            count - select(count, bounds, starts, count.dtype),
            select(count, bounds, over, jnp.float32),
            select(count, bounds, peaks, jnp.float32),
        )

    def function(count: jax.Array) -> jax.Array:
        since, over, peaks = cycle(jnp.minimum(count, steps))
        angle = rounded(times(since.astype(jnp.float32), np.pi) * over)
        left = times(0.5 * (1.0 + jnp.cos(angle)), 1.0 - end_ratio) + np.float32(end_ratio)
        return rounded(rounded(left) * peaks)

    words = f"cosine with {len(bounds)} warm restarts"
    return Schedule(function, words, (0, *bounds, steps))


def _filling(period_factor: float, steps: int, cycles: int = 3) -> tuple[int, ...]:
    """Restarts such that so many cycles fill a run, or fewer where one would have no update."""
    check_finite(period_factor=period_factor)
    if period_factor < 1:
        raise ValueError(f"period_factor must be at least 1, got {period_factor!r}.")
    factor = Fraction(str(period_factor))
    ends = [sum(factor**j for j in range(i)) for i in range(1, cycles + 1)]
    bounds = [round(steps * end / ends[-1]) for end in ends]
    if all(after > before for before, after in itertools.pairwise((0, *bounds))):
        return tuple(bounds[:-1])
    return _filling(period_factor, steps, cycles - 1)


def _next(first_period: int, period_factor: float, steps: int) -> int:
    """The first boundary at or after `steps`."""
    return next(count for count in _endless(first_period, period_factor) if count >= steps)


MODES = ("triangular", "triangular2", "exp_range")


@checked
def cyclic(
    peak: float,
    rise_steps: int,
    fall_steps: int | None = None,
    *,
    low_ratio: float = 0.1,
    mode: str = "triangular",
    factor: float = 0.9999,
) -> Schedule:
    r"""Triangles between a low and a high value, forever.

    .. math:: v_t = l + (h - l) \, s_t \, \Lambda(t)

    where :math:`\Lambda` rises from 0 to 1 and falls back, and the height :math:`s_t` is 1
    (``"triangular"``), halved after each cycle (``"triangular2"``) or :math:`\gamma^t`
    (``"exp_range"``).

    Args:
      peak: :math:`h`.
      rise_steps: updates of the rise, at least 1.
      fall_steps: updates of the fall; by default as many.
      low_ratio: :math:`l / h` in [0, 1].
      mode: one of the three above.
      factor: :math:`\gamma` in (0, 1], for ``"exp_range"`` only.

    Raises:
      ValueError: for values out of range or an unknown mode.

    Source: Smith, 2017, https://arxiv.org/abs/1506.01186; the same as PyTorch's ``CyclicLR``.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.cyclic(1.0, 2, low_ratio=0.0, mode="triangular2")
      >>> [float(schedule(t)) for t in range(8)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 0.25]
    """
    fall = rise_steps if fall_steps is None else fall_steps
    check_finite(peak=peak)
    check_whole(1, rise_steps=rise_steps, fall_steps=fall)
    check_ratio(low_ratio=low_ratio, factor=factor)
    check_positive(factor=factor)
    check_name("mode", mode, MODES)
    low, period = peak * low_ratio, rise_steps + fall
    check_whole(2, **{"rise_steps and fall_steps together": period})

    def function(count: jax.Array) -> jax.Array:
        within = jnp.remainder(count, period)
        up = times(within.astype(jnp.float32), 1.0 / rise_steps)
        down = times((period - within).astype(jnp.float32), 1.0 / fall)
        height = jnp.minimum(jnp.where(within < rise_steps, up, down), 1.0)
        if mode == "triangular2":
            height = rounded(height * raised(0.5, (count // period).astype(jnp.float32)))
        elif mode == "exp_range":
            height = rounded(height * raised(factor, count.astype(jnp.float32)))
        return between(peak, low, height)

    marks = (0, rise_steps, period, period + rise_steps)
    return Schedule(function, f"{mode} cycles of {period} updates", marks)


@checked
def one_cycle(
    peak: float,
    steps: int,
    end_ratio: float = 4e-6,
    *,
    rise: float = 0.3,
    fall: float = 0.85,
    start_ratio: float = 0.04,
    shape: str = "cosine",
) -> Schedule:
    r"""Up once and down once.

    ``"cosine"`` rises over a share `rise` of the run from its start to the peak and falls to the
    end; ``"linear"`` falls back to the start at the share `fall` and from there to the end.

    Args:
      peak: the highest value.
      steps: the length of the run, at least 3.
      end_ratio: the end, relative to the peak.
      rise: the share of the run in which the value rises, in (0, 1).
      fall: for ``"linear"``, the share of the run at which it is back, in (rise, 1).
      start_ratio: the start, relative to the peak, in (0, 1].
      shape: ``"cosine"`` or ``"linear"``.

    Raises:
      ValueError: for values out of range, an unknown shape, or phases without an update.

    Source: Smith and Topin, 2018, https://arxiv.org/abs/1708.07120; the same as Optax's
    ``cosine_onecycle_schedule`` and ``linear_onecycle_schedule``.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.one_cycle(1.0, 10, end_ratio=0.0, shape="linear")
      >>> [round(float(schedule(t)), 2) for t in (0, 3, 8, 10)]
      [0.04, 1.0, 0.04, 0.0]
    """
    check_whole(3, steps=steps)
    check_ratio(rise=rise, fall=fall, start_ratio=start_ratio, end_ratio=end_ratio)
    check_name("shape of a cycle", shape, ("cosine", "linear"))
    if rise == 1:
        raise ValueError("rise must be below 1, since the fall takes the rest of the run.")
    if shape == "linear" and not rise < fall < 1:
        raise ValueError(f"fall {fall!r} must lie above rise {rise!r} and below 1.")
    if rise * steps < 1:
        raise ValueError(f"rise must be at least one update, {1 / steps:.3g}, got {rise!r}.")
    counts, ratios = [int(rise * steps), steps], [1.0, end_ratio]
    if shape == "linear":
        counts.insert(1, int(fall * steps))
        ratios.insert(1, start_ratio)
    schedule = piecewise(peak, counts, ratios, start_ratio=start_ratio, interpolate=shape)
    return Schedule(schedule.function, f"one {shape} cycle", schedule.boundaries)
