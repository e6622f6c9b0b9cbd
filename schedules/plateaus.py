"""Shapes with a plateau: WSD, its simplified form, and infinite cosine."""

from collections.abc import Sequence

from ..core.arguments import checked
from ..core.checks import check_ratio, check_whole
from ._checks import check_fits
from ._schedule import Schedule
from .operators import anneal_from, join, warmup
from .shapes import constant, cosine


@checked
def wsd(
    peak: float,
    steps: int,
    end_ratio: float = 0.0,
    *,
    decay_steps: int | None = None,
    shape: str = "1-sqrt",
    warmup_steps: int = 0,
) -> Schedule:
    """Warm-up, stable, decay: a plateau with a cooldown at its end.

    Args:
      peak: the value of the plateau.
      steps: the whole length, warm-up and decay included.
      end_ratio: the share of the peak at the end.
      decay_steps: updates of the cooldown, at least 1; by default a fifth of the run.
      shape: of the cooldown, see :func:`decay`.
      warmup_steps: updates of a linear :func:`warmup`; 0 where another one goes in front.

    Raises:
      ValueError: for values out of range, an unknown shape, or phases longer than the run.

    Source: Hu et al. (MiniCPM), 2024, https://arxiv.org/abs/2404.06395; the shape and the fifth:
    Hägele et al., 2024, https://arxiv.org/abs/2405.18392.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.wsd(1.0, 10, decay_steps=4, shape="linear", warmup_steps=2)
      >>> [float(schedule(t)) for t in (0, 1, 6, 7, 8, 10)]
      [0.5, 1.0, 1.0, 0.75, 0.5, 0.0]
    """
    check_whole(1, steps=steps)
    check_whole(0, warmup_steps=warmup_steps)
    cooldown = decay_steps if decay_steps is not None else max(1, round(steps / 5))
    check_whole(1, decay_steps=cooldown)
    check_fits({"warmup_steps": warmup_steps, "decay_steps": cooldown}, steps)
    stable = steps - warmup_steps - cooldown
    return warmup(anneal_from(constant(peak), stable, cooldown, shape, end_ratio), warmup_steps)


@checked
def wsd_s(
    peak: float,
    steps: int,
    end_ratio: float = 0.1,
    *,
    periods: Sequence[int] | None = None,
    decay_ratio: float = 0.1,
    shape: str = "inverse",
) -> Schedule:
    """Plateaus that each end in a cooldown, and go on from the cooled weights without a warm-up.

    Every end of a period is a finished model, and no update is thrown away.

    Args:
      peak: the value of the plateaus.
      steps: the whole length.
      end_ratio: the share of the peak at the end of each cooldown.
      periods: lengths of the periods, which add up to `steps`; by default two equal ones.
      decay_ratio: the share of each period that is cooldown, in (0, 1].
      shape: of the cooldown, see :func:`decay`.

    Raises:
      ValueError: for values out of range, an unknown shape, or periods that do not add up.

    Source: Wen et al., 2024, https://arxiv.org/abs/2410.05192.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.wsd_s(1.0, 20, 0.25, periods=[10, 10], decay_ratio=0.2)
      >>> [round(float(schedule(t)), 2) for t in (8, 9, 10, 18, 19, 20)]
      [1.0, 0.4, 1.0, 1.0, 0.4, 0.25]
    """
    check_whole(1, steps=steps)
    check_ratio(decay_ratio=decay_ratio)
    if periods is None and steps == 1:
        raise ValueError("periods must be given for a run of one step, which has no two: [1].")
    lengths = tuple(periods) if periods is not None else (steps - steps // 2, steps // 2)
    for length in lengths:
        check_whole(1, periods=length)
    if sum(lengths) != steps:
        raise ValueError(
            f"periods must add up to steps, but {' + '.join(map(str, lengths))} = {sum(lengths)} "
            f"and steps is {steps}."
        )
    parts = [
        wsd(peak, length, end_ratio, decay_steps=max(1, round(decay_ratio * length)), shape=shape)
        for length in lengths
    ]
    bounds = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    return join(parts, bounds)


@checked
def infinite_cosine(
    peak: float,
    steps: int,
    end_ratio: float = 0.01,
    *,
    cooldown_steps: int | None = None,
    plateau_ratio: float = 0.5,
    decay_steps: int | None = None,
) -> Schedule:
    """A cosine down to a plateau, which can go on forever, and an exponential anneal off it.

    Args:
      peak: the value at count 0.
      steps: the whole length.
      end_ratio: the share of the peak at the end of the anneal, above 0.
      cooldown_steps: updates of the cosine; by default two fifths of the run.
      plateau_ratio: the plateau, relative to the peak, at least `end_ratio`.
      decay_steps: updates of the anneal; by default a fifth of the run; 0 leaves it out.

    Raises:
      ValueError: for values out of range or phases longer than the run.

    Source: Ibrahim et al., 2024, https://arxiv.org/abs/2403.08763; Singh et al., 2025,
    https://arxiv.org/abs/2503.02844.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.infinite_cosine(1.0, 100, plateau_ratio=0.25)
      >>> [round(float(schedule(t)), 2) for t in (0, 20, 40, 80, 90, 100)]
      [1.0, 0.62, 0.25, 0.25, 0.05, 0.01]
    """
    check_whole(1, steps=steps)
    cosine_steps = cooldown_steps if cooldown_steps is not None else max(1, 2 * steps // 5)
    anneal_steps = decay_steps if decay_steps is not None else steps // 5
    check_whole(1, cooldown_steps=cosine_steps)
    check_whole(0, decay_steps=anneal_steps)
    check_fits({"cooldown_steps": cosine_steps, "decay_steps": anneal_steps}, steps)
    check_ratio(end_ratio=end_ratio, plateau_ratio=plateau_ratio)
    if plateau_ratio < end_ratio or plateau_ratio == 0:
        raise ValueError(
            f"plateau_ratio {plateau_ratio} must be above 0 and at least end_ratio {end_ratio}."
        )
    body = cosine(peak, cosine_steps, plateau_ratio)
    if not anneal_steps:
        return body
    return anneal_from(
        body, steps - anneal_steps, anneal_steps, "exponential", end_ratio / plateau_ratio
    )
