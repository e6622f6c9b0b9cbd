"""Shapes that do not depend on the length of the run."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import checked
from ..core.checks import LARGEST_COUNT, check_finite, check_positive, check_whole
from ._arithmetic import power, times
from ._schedule import Schedule


@checked
def inverse_sqrt(peak: float, timescale: int = 10_000) -> Schedule:
    r"""An inverse square root that starts at its peak.

    .. math:: \eta_t = \eta \sqrt{\tau / (t + \tau)}

    After a warm-up of :math:`W = \tau` updates it is :math:`\eta \sqrt{W / t}` in the run's own
    count.

    Args:
      peak: :math:`\eta`, the value at count 0.
      timescale: :math:`\tau` in updates, at least 1.

    Raises:
      ValueError: for values out of range.

    Source: huggingface/transformers, ``get_inverse_sqrt_schedule``; google-research/big_vision,
    ``rsqrt``.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.inverse_sqrt(1.0, 3)(t)) for t in (0, 9)]
      [1.0, 0.5]
    """
    check_finite(peak=peak)
    check_whole(1, timescale=timescale)

    def function(count: jax.Array) -> jax.Array:
        later = count.astype(jnp.float32) + np.float32(timescale)
        return times(jnp.sqrt(np.float32(timescale) / later), peak)

    return Schedule(function, "inverse square root")


@checked
def noam(peak: float, warmup_steps: int = 4000) -> Schedule:
    r"""The original Transformer's schedule, its own warm-up included; :math:`s = t + 1`.

    .. math:: \eta_t = \eta \, \min(s / W, \sqrt{W / s})

    The paper writes :math:`d^{-1/2} \min(s^{-1/2}, s W^{-3/2})` for a width :math:`d`, whose peak is
    :math:`\eta = (d W)^{-1/2}`.

    Args:
      peak: :math:`\eta`, the value of update number :math:`W`.
      warmup_steps: :math:`W`, at least 1.

    Raises:
      ValueError: for values out of range.

    Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, equation 3.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.noam(1.0, 4)(t)) for t in (0, 3, 15)]
      [0.25, 1.0, 0.5]
    """
    check_finite(peak=peak)
    check_whole(1, warmup_steps=warmup_steps)

    def function(count: jax.Array) -> jax.Array:
        update = count.astype(jnp.float32) + 1.0
        rise = times(update, 1.0 / warmup_steps)
        fall = jnp.sqrt(np.float32(warmup_steps) / update)
        return times(jnp.where(count < warmup_steps, rise, fall), peak)

    return Schedule(
        function, "Noam: linear warm-up, then inverse square root", (0, warmup_steps - 1)
    )


@checked
def t5(peak: float, timescale: int = 10_000) -> Schedule:
    r"""Constant, then an inverse square root of the count.

    .. math:: \eta_t = \eta \sqrt{k / \max(t, k)}

    Args:
      peak: :math:`\eta`; T5's own, :math:`1 / \sqrt{\max(t, k)}`, has the peak 0.01.
      timescale: :math:`k` in updates, at least 1.

    Raises:
      ValueError: for values out of range.

    Source: Raffel et al., 2020, https://arxiv.org/abs/1910.10683, section 3.1.2.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.t5(1.0, 4)(t)) for t in (0, 4, 16)]
      [1.0, 1.0, 0.5]
    """
    check_finite(peak=peak)
    check_whole(1, timescale=timescale)

    def function(count: jax.Array) -> jax.Array:
        later = jnp.maximum(count, timescale).astype(jnp.float32)
        return times(jnp.sqrt(np.float32(timescale) / later), peak)

    return Schedule(function, "constant, then inverse square root", (0, timescale))


@checked
def power_law(
    peak: float,
    tokens_per_step: int,
    batch_size: int,
    *,
    scale: float = 4.6,
    exponent: float = -0.51,
) -> Schedule:
    r"""A power of the tokens seen, capped; :math:`n` is :math:`t` times the tokens per step.

    .. math:: \eta_t = \min(\eta, B \, a \, n^b)

    With a growing batch, build it with the ticks and the clock of :func:`follow_data`.

    Args:
      peak: :math:`\eta`, the cap.
      tokens_per_step: tokens per update, at least 1.
      batch_size: :math:`B`, sequences per update.
      scale: :math:`a`.
      exponent: :math:`b`, negative.

    Raises:
      ValueError: for values out of range.

    Source: Shen et al., 2024, https://arxiv.org/abs/2408.13359, whose constants are the defaults
    (for a model in muP).

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.power_law(0.02, tokens_per_step=2**20, batch_size=256)
      >>> [round(float(schedule(t)), 5) for t in (0, 10_000, 100_000)]
      [0.02, 0.00913, 0.00282]
    """
    check_finite(peak=peak)
    check_whole(1, tokens_per_step=tokens_per_step, batch_size=batch_size)
    check_positive(scale=scale)
    if not (np.isfinite(exponent) and exponent < 0):
        raise ValueError(f"exponent must be negative, got {exponent!r}; the paper has -0.51.")
    first = batch_size * scale * float(tokens_per_step) ** exponent
    check_positive(**{"batch_size * scale * tokens_per_step**exponent": first})
    marks = (0,)
    if peak > 0:  # by logarithms, as the count at which the law is below the cap may have no float
        reached = (math.log(peak) - math.log(first)) / exponent
        if reached <= math.log(LARGEST_COUNT):
            marks = (0, math.ceil(math.exp(reached)))

    def function(count: jax.Array) -> jax.Array:
        law = times(power(jnp.maximum(count, 1).astype(jnp.float32), exponent), first)
        return jnp.where(count == 0, np.float32(peak), jnp.minimum(law, np.float32(peak)))

    return Schedule(function, "constant, then a power of the tokens", marks)
