"""Momentum, second moments and averages by how fast they forget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import check_finite, check_positive, check_whole
from ._arithmetic import select
from ._checks import check_fits
from ._schedule import Schedule
from .batch_size import BatchSizes
from .operators import join, ramp
from .shapes import constant


@checked
def decay_rate(half_life: float, per_step: float = 1.0) -> float:
    r"""The decay rate that halves a moment in `half_life`.

    .. math:: \beta = 2^{-n / h}

    Args:
      half_life: :math:`h`, in updates, or in tokens where `per_step` is.
      per_step: :math:`n`, tokens per update.

    Raises:
      ValueError: for values that are not positive.

    Source: Marek et al., 2025, https://arxiv.org/abs/2507.07101, who hold the half-life of
    Adam's second moment at 10 million tokens for any batch size.

    Example:
      >>> import ravine
      >>> round(ravine.schedules.decay_rate(10e6, per_step=512 * 1024), 4)
      0.9643
    """
    check_positive(half_life=half_life, per_step=per_step)
    return 2.0 ** (-per_step / half_life)


@checked
def half_life(decay_rate: float, per_step: float = 1.0) -> float:
    r"""The inverse of :func:`decay_rate`: :math:`h = -n / \log_2 \beta`.

    Args:
      decay_rate: :math:`\beta` in (0, 1).
      per_step: :math:`n`, tokens per update; 1 for a half-life in updates.

    Raises:
      ValueError: for values out of range.

    Example:
      >>> import ravine
      >>> round(ravine.schedules.half_life(0.999), 1)
      692.8
    """
    check_positive(decay_rate=decay_rate, per_step=per_step)
    if decay_rate >= 1:
        raise ValueError(f"decay_rate must lie between 0 and 1, got {decay_rate!r}.")
    return -per_step / float(np.log2(decay_rate))


@checked
def half_life_in_tokens(half_life: float, batch: BatchSizes, context: int) -> Schedule:
    """A decay rate whose half-life in tokens stays while the batch grows.

    Args:
      half_life: in tokens.
      batch: the batch sizes, in examples.
      context: tokens per example.

    Raises:
      ValueError: for values that are not positive.

    Source: Marek et al., 2025, https://arxiv.org/abs/2507.07101.

    Example:
      >>> import ravine
      >>> from ravine.schedules import BatchSizes, half_life_in_tokens
      >>> b2 = half_life_in_tokens(1000, BatchSizes((1, 2), (5,)), context=1000)
      >>> [float(b2(count)) for count in (0, 5)]
      [0.5, 0.25]
    """
    check_whole(1, context=context)
    rates = [decay_rate(half_life, size * context) for size in batch.sizes]
    return Schedule(
        lambda count: select(count, batch.boundaries, rates, jnp.float32),
        f"decay rate of a half-life of {half_life:g} tokens",
        (0, *batch.boundaries),
    )


@checked
def ema_horizon(horizon: float, share: float = 1.0) -> Schedule:
    r"""The decay rate of an average whose horizon grows with the run, up to a limit.

    .. math:: \beta_t = 1 - 1 / H_t, \qquad H_t = \min(H, 1 + s t)

    With :math:`s = 1` it is :math:`t / (1 + t)`, the plain mean of everything so far, until it
    becomes an exponential average over :math:`H` updates.

    Args:
      horizon: :math:`H` in updates, at least 1.
      share: :math:`s` in (0, 1], the share of the run so far that the average covers.

    Raises:
      ValueError: for values out of range.

    Source: ``ema_schedule`` of apple/axlearn.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.ema_horizon(4)(count)) for count in (0, 1, 3, 9)]
      [0.0, 0.5, 0.75, 0.75]
    """
    check_positive(horizon=horizon, share=share)
    if horizon < 1 or share > 1:
        raise ValueError(
            f"horizon must be at least 1 and share at most 1, got {horizon!r} and {share!r}."
        )
    reached = int(np.ceil((horizon - 1) / share))
    check_whole(0, **{"(horizon - 1) / share": reached})

    def function(count: jax.Array) -> jax.Array:
        inverse = np.float32(1 / share) / (count.astype(jnp.float32) + np.float32(1 / share))
        return jnp.where(count >= reached, np.float32(1 - 1 / horizon), 1.0 - inverse)

    return Schedule(function, f"decay rate of a horizon growing to {horizon:g}", (0, reached))


@checked
def momentum(
    start: float,
    peak: float,
    warmup_steps: int,
    steps: int,
    *,
    end: float | None = None,
    cooldown_steps: int = 0,
) -> Schedule:
    """Momentum that warms up, stays, and cools down with the learning rate.

    Args:
      start: the value at count 0.
      peak: the value of the plateau.
      warmup_steps: updates of the rise, at least 1.
      steps: the length of the run.
      end: the value at the end; by default the peak.
      cooldown_steps: updates of the cooldown.

    Raises:
      ValueError: for values out of range or phases longer than the run.

    Source: Muon's momentum in karpathy/nanochat: 0.85 to 0.97 over 400 updates, 0.90 at the end.

    Example:
      >>> import ravine
      >>> b1 = ravine.schedules.momentum(0.85, 0.97, 400, 2000, end=0.9, cooldown_steps=1000)
      >>> [round(float(b1(count)), 3) for count in (0, 400, 1000, 1500, 2000)]
      [0.85, 0.97, 0.97, 0.935, 0.9]
    """
    last = peak if end is None else end
    for name, value in (("start", start), ("peak", peak), ("end", last)):
        check_finite(**{name: value})
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")
    check_whole(1, warmup_steps=warmup_steps, steps=steps)
    check_whole(0, cooldown_steps=cooldown_steps)
    check_fits({"warmup_steps": warmup_steps, "cooldown_steps": cooldown_steps}, steps)
    parts: list[optax.Schedule] = [ramp(start, peak, warmup_steps)]
    bounds = []
    plateau = steps - warmup_steps - cooldown_steps
    if plateau:
        parts.append(constant(peak))
        bounds.append(warmup_steps)
    if cooldown_steps:
        parts.append(ramp(peak, last, cooldown_steps))
        bounds.append(warmup_steps + plateau)
    return join(parts, bounds)
