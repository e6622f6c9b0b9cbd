"""Schedules given point by point."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import checked
from ..core.checks import check_finite, check_name, check_positive, check_ratio, check_whole
from ._arithmetic import half_cosine, raised, rounded, select, times
from ._checks import check_boundaries, check_length
from ._schedule import Schedule

INTERPOLATIONS = ("none", "linear", "cosine")


@checked
def piecewise(
    peak: float,
    boundaries: Sequence[int],
    ratios: Sequence[float],
    *,
    start_ratio: float = 1.0,
    interpolate: str = "none",
) -> Schedule:
    r"""Values at given counts.

    Args:
      peak: what the ratios are relative to.
      boundaries: counts, rising, the first at least 1.
      ratios: the value from each boundary on, relative to the peak (Optax multiplies scales up;
        these are not).
      start_ratio: the value at count 0, relative to the peak.
      interpolate: ``"none"``, jumps at the boundaries; ``"linear"`` or ``"cosine"``, from each
        value to the next.

    Raises:
      ValueError: for unsorted boundaries, lists of different lengths, an unknown interpolation.

    Source: as ``optax.piecewise_constant_schedule`` and ``optax.piecewise_interpolate_schedule``.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.piecewise(1.0, [2, 4], [0.5, 0.25])
      >>> [float(schedule(t)) for t in range(5)]
      [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    check_finite(peak=peak, start_ratio=start_ratio)
    bounds = check_boundaries(boundaries)
    check_length("ratios", ratios, len(bounds), "one for each boundary")
    for ratio in ratios:
        check_finite(ratios=ratio)
    check_name("interpolation", interpolate, INTERPOLATIONS)
    values = [peak * ratio for ratio in (start_ratio, *ratios)]
    if interpolate == "none":
        words = f"constant in {len(values)} pieces"
        return Schedule(lambda c: select(c, bounds, values, jnp.float32), words, (0, *bounds))
    starts = (0, *bounds)
    ends = (*values[1:], values[-1])
    over = (*(np.float32(1) / np.diff(starts).astype(np.float32)), 0.0)

    def function(count: jax.Array) -> jax.Array:
        start = select(count, bounds, values, jnp.float32)
        end = select(count, bounds, ends, jnp.float32)
        since = count - select(count, bounds, starts, count.dtype)
        x = rounded(since.astype(jnp.float32) * select(count, bounds, over, jnp.float32))
        if interpolate == "linear":
            return rounded(rounded((end - start) * x) + start)
        return rounded(end + rounded((start - end) * half_cosine(x)))

    return Schedule(function, f"{interpolate} through {len(values)} points", starts)


@checked
def step_decay(peak: float, every: int, factor: float = 0.1, *, end_ratio: float = 0.0) -> Schedule:
    r"""Multiplies by a factor every so often.

    .. math:: \eta_t = \eta \max(e, \gamma^{\lfloor t / n \rfloor})

    Args:
      peak: :math:`\eta`, the value at count 0.
      every: :math:`n` in updates, at least 1.
      factor: :math:`\gamma` in (0, 1].
      end_ratio: :math:`e` in [0, 1], below which it never falls.

    Raises:
      ValueError: for values out of range.

    Source: the same as ``optax.exponential_decay`` with ``staircase=True`` and PyTorch's
    ``StepLR``.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.step_decay(1.0, 2, 0.5)(t)) for t in range(5)]
      [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    check_finite(peak=peak)
    check_whole(1, every=every)
    check_ratio(factor=factor, end_ratio=end_ratio)
    check_positive(factor=factor)

    def function(count: jax.Array) -> jax.Array:
        ratio = raised(factor, (count // every).astype(jnp.float32))
        return times(jnp.maximum(ratio, np.float32(end_ratio)), peak)

    return Schedule(function, f"times {factor:g} every {every} updates", (0, every, 2 * every))
