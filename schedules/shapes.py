"""Shapes: how a value moves from its peak to its end over a number of steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..core.arguments import checked
from ..core.checks import check_finite, check_name, check_positive, check_ratio, check_whole
from ._arithmetic import between, half_cosine, power, progress, raised, rounded, times
from ._schedule import Schedule


@checked
def constant(value: float) -> Schedule:
    r"""The same value at every count.

    Args:
      value: any finite number.

    Raises:
      ValueError: if the value is not finite.

    Example:
      >>> import ravine
      >>> float(ravine.schedules.constant(0.5)(7))
      0.5
    """
    check_finite(value=value)
    return Schedule(lambda count: jnp.full(count.shape, value, jnp.float32), "constant")


def _check(peak: float, steps: int, end_ratio: float) -> None:
    check_finite(peak=peak)
    check_whole(1, steps=steps)
    check_ratio(end_ratio=end_ratio)


def _fall(
    words: str, peak: float, steps: int, end_ratio: float, left: Callable[[jax.Array], jax.Array]
) -> Schedule:
    """From the peak to its share `end_ratio`, as `left` of the progress falls from 1 to 0."""
    _check(peak, steps, end_ratio)
    end = peak * end_ratio
    return Schedule(
        lambda count: between(peak, end, left(progress(count, steps))), words, (0, steps)
    )


def _proportional(
    words: str, peak: float, steps: int, end_ratio: float, ratio: Callable[[jax.Array], jax.Array]
) -> Schedule:
    """From the peak to its share `end_ratio`, above 0, by a ratio of the progress."""
    _check(peak, steps, end_ratio)
    if end_ratio == 0:
        raise ValueError(f"{words} decay never reaches zero; give an end_ratio above 0, say 0.01.")

    def function(count: jax.Array) -> jax.Array:
        falling = ratio(progress(count, steps))
        return times(jnp.where(count >= steps, np.float32(end_ratio), falling), peak)

    return Schedule(function, words, (0, steps))


@checked
def linear(peak: float, steps: int, end_ratio: float = 0.0) -> Schedule:
    r"""A straight line, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, (1 - (1 - e) x)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1]; 0 decays to zero.

    Raises:
      ValueError: for values out of range.

    Source: Bergsma et al., 2025, https://arxiv.org/abs/2502.15938; the same as
    ``optax.linear_schedule``.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.linear(1.0, 4)(t)) for t in (0, 1, 4, 5)]
      [1.0, 0.75, 0.0, 0.0]
    """
    return _fall("linear", peak, steps, end_ratio, lambda x: 1.0 - x)


@checked
def decay_to_zero(peak: float, steps: int) -> Schedule:
    r"""A straight line to zero; the last update, at count T - 1, still takes :math:`\eta / T`.

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.

    Raises:
      ValueError: for values out of range.

    Source: Bergsma et al., 2025, https://arxiv.org/abs/2502.15938, who find it better than a
    tenth of the peak at the end, and more so with more tokens per parameter.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.decay_to_zero(1.0, 4)(t)) for t in (0, 3, 4)]
      [1.0, 0.25, 0.0]
    """
    return _fall("decay to zero", peak, steps, 0.0, lambda x: 1.0 - x)


@checked
def polynomial(
    peak: float, steps: int, end_ratio: float = 0.0, *, exponent: float = 2.0
) -> Schedule:
    r"""A power of what is left, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, \left(e + (1 - e) (1 - x)^p\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1].
      exponent: :math:`p`, positive; 1 is :func:`linear`.

    Raises:
      ValueError: for values out of range.

    Source: the same as ``optax.polynomial_schedule``.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.polynomial(1.0, 4)(t)) for t in (0, 2, 4)]
      [1.0, 0.25, 0.0]
    """
    check_positive(exponent=exponent)
    words = f"polynomial of power {exponent:g}"
    return _fall(words, peak, steps, end_ratio, lambda x: power(1.0 - x, exponent))


@checked
def cosine(peak: float, steps: int, end_ratio: float = 0.0, *, exponent: float = 1.0) -> Schedule:
    r"""Half a period of a cosine, with :math:`x = \min(t / T, 1)`.

    .. math::
        \eta_t = \eta \, \left(e + (1 - e) \left(\tfrac{1}{2} (1 + \cos \pi x)\right)^p\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1]; 0.1 is the custom of language models.
      exponent: :math:`p`, positive.

    Raises:
      ValueError: for values out of range.

    Source: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983; the same as
    ``optax.cosine_decay_schedule``.

    Example:
      >>> import ravine
      >>> [round(float(ravine.schedules.cosine(1.0, 4)(t)), 3) for t in (0, 1, 2, 4, 9)]
      [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _check(peak, steps, end_ratio)
    check_positive(exponent=exponent)

    def function(count: jax.Array) -> jax.Array:
        # Multiplied in Optax's order, pi t first.
        x = jnp.minimum(count, steps).astype(jnp.float32)
        angle = times(times(x, np.pi), np.float32(1) / np.float32(steps))
        left = power(0.5 * (1.0 + jnp.cos(angle)), exponent)
        ratio = rounded(times(left, 1.0 - end_ratio) + np.float32(end_ratio))
        return times(jnp.where(count >= steps, np.float32(end_ratio), ratio), peak)

    words = "cosine" if exponent == 1 else f"cosine to the power {exponent:g}"
    return Schedule(function, words, (0, steps))


@checked
def exponential(peak: float, steps: int, end_ratio: float = 0.1) -> Schedule:
    r"""The same factor at every update, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, e^x

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in (0, 1]; a half makes :math:`T` the half-life.

    Raises:
      ValueError: for values out of range, and for an end of zero, which this shape never reaches.

    Source: the cooldown of Hu et al. (MiniCPM), 2024, https://arxiv.org/abs/2404.06395; the same
    as ``optax.exponential_decay`` with that decay rate.

    Example:
      >>> import ravine
      >>> [round(float(ravine.schedules.exponential(1.0, 2, 0.01)(t)), 3) for t in (0, 1, 2)]
      [1.0, 0.1, 0.01]
    """
    return _proportional("exponential", peak, steps, end_ratio, lambda x: raised(end_ratio, x))


@checked
def inverse(peak: float, steps: int, end_ratio: float = 0.1) -> Schedule:
    r"""A straight line of the reciprocal, with :math:`x = \min(t / T, 1)`.

    .. math:: \frac{1}{\eta_t} = \frac{1 - x}{\eta} + \frac{x}{\eta e}

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in (0, 1].

    Raises:
      ValueError: for values out of range, and for an end of zero, which this shape never reaches.

    Source: the decay of Wen et al. (WSD-S), 2024, https://arxiv.org/abs/2410.05192.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.inverse(1.0, 2, 0.25)(t)) for t in (0, 1, 2)]
      [1.0, 0.4000000059604645, 0.25]
    """
    return _proportional(
        "inverse", peak, steps, end_ratio, lambda x: 1.0 / (1.0 + times(x, 1.0 / end_ratio - 1.0))
    )


@checked
def one_minus_sqrt(peak: float, steps: int, end_ratio: float = 0.0) -> Schedule:
    r"""Steep first, flat later, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, \left(e + (1 - e) (1 - \sqrt{x})\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1].

    Raises:
      ValueError: for values out of range.

    Source: the best cooldown of Hägele et al., 2024, https://arxiv.org/abs/2405.18392.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.one_minus_sqrt(1.0, 4)(t)) for t in (0, 1, 4)]
      [1.0, 0.5, 0.0]
    """
    return _fall("1 - sqrt", peak, steps, end_ratio, lambda x: 1.0 - jnp.sqrt(x))


@checked
def square(peak: float, steps: int, end_ratio: float = 0.0) -> Schedule:
    r"""Flat first, steep later, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, \left(e + (1 - e) (1 - x^2)\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1].

    Raises:
      ValueError: for values out of range.

    Source: Hägele et al., 2024, https://arxiv.org/abs/2405.18392, official code.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.square(1.0, 4)(t)) for t in (0, 2, 4)]
      [1.0, 0.75, 0.0]
    """
    return _fall("square", peak, steps, end_ratio, lambda x: 1.0 - rounded(x * x))


@checked
def mirror_cosine(peak: float, steps: int, end_ratio: float = 0.0) -> Schedule:
    r"""The cosine mirrored at the straight line, with :math:`x = \min(t / T, 1)`.

    .. math::
        \eta_t = \eta \, \left(e + (1 - e) (2 (1 - x) - \tfrac{1}{2} (1 + \cos \pi x))\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1].

    Raises:
      ValueError: for values out of range.

    Source: Hägele et al., 2024, https://arxiv.org/abs/2405.18392, official code.

    Example:
      >>> import ravine
      >>> [round(float(ravine.schedules.mirror_cosine(1.0, 4)(t)), 3) for t in (0, 1, 2, 4)]
      [1.0, 0.646, 0.5, 0.0]
    """
    return _fall(
        "mirror cosine", peak, steps, end_ratio, lambda x: 2.0 * (1.0 - x) - half_cosine(x)
    )


DECAYS: dict[str, Callable[[float, int, float], Schedule]] = {
    "linear": linear,
    "1-sqrt": one_minus_sqrt,
    "cosine": cosine,
    "square": square,
    "mirror-cosine": mirror_cosine,
    "inverse": inverse,
    "exponential": exponential,
}


@checked
def decay(peak: float, steps: int, shape: str = "linear", end_ratio: float = 0.0) -> Schedule:
    """A decay whose shape is given by name.

    Args:
      peak: the value at count 0.
      steps: the length in updates, at least 1.
      shape: ``"linear"``, ``"1-sqrt"``, ``"cosine"``, ``"square"``, ``"mirror-cosine"``,
        ``"inverse"`` or ``"exponential"``.
      end_ratio: the share of the peak at the end; the last two need it above 0.

    Raises:
      ValueError: for an unknown shape and values out of range.

    Example:
      >>> import ravine
      >>> float(ravine.schedules.decay(1.0, 4, "1-sqrt")(1))
      0.5
    """
    check_name("decay shape", shape, DECAYS)
    return DECAYS[shape](peak, steps, end_ratio)
