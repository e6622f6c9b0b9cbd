"""Shapes: how a value moves from its start to its end over a number of steps."""

import math

import jax.numpy as jnp
import optax


def _check(peak: float, steps: int, end_ratio: float) -> None:
    if not math.isfinite(peak):
        raise ValueError(f"peak must be finite, got {peak!r}.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}.")
    if not 0.0 <= end_ratio <= 1.0:
        raise ValueError(f"end_ratio must lie in [0, 1], got {end_ratio!r}.")


def constant(value: float) -> optax.Schedule:
    r"""The same value at every count.

    Example:
      >>> import ravine
      >>> float(ravine.schedules.constant(0.5)(7))
      0.5
    """
    if not math.isfinite(value):
        raise ValueError(f"value must be finite, got {value!r}.")
    return lambda count: jnp.full(jnp.shape(count), value, jnp.float32)


def linear(peak: float, steps: int, end_ratio: float = 0.0) -> optax.Schedule:
    r"""A straight line, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, (1 - (1 - e) x)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1]; 0 decays to zero.

    Raises:
      ValueError: for values out of range.

    Source: decay to zero: Bergsma et al., 2025, https://arxiv.org/abs/2502.15938.

    Example:
      >>> import ravine
      >>> [float(ravine.schedules.linear(1.0, 4)(t)) for t in (0, 1, 4, 5)]
      [1.0, 0.75, 0.0, 0.0]
    """
    _check(peak, steps, end_ratio)

    def schedule(count):
        x = jnp.clip(jnp.asarray(count, jnp.float32) / steps, 0.0, 1.0)
        return jnp.float32(peak) * (1.0 - (1.0 - end_ratio) * x)

    return schedule


def cosine(peak: float, steps: int, end_ratio: float = 0.0) -> optax.Schedule:
    r"""Half a period of a cosine, with :math:`x = \min(t / T, 1)`.

    .. math:: \eta_t = \eta \, \left(e + (1 - e) \tfrac{1}{2} (1 + \cos \pi x)\right)

    Args:
      peak: :math:`\eta`, the value at count 0.
      steps: :math:`T`, at least 1.
      end_ratio: :math:`e` in [0, 1].

    Raises:
      ValueError: for values out of range.

    Source: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983.

    Example:
      >>> import ravine
      >>> [round(float(ravine.schedules.cosine(1.0, 4)(t)), 3) for t in (0, 1, 2, 4, 9)]
      [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    _check(peak, steps, end_ratio)

    def schedule(count):
        x = jnp.clip(jnp.asarray(count, jnp.float32) / steps, 0.0, 1.0)
        return jnp.float32(peak) * (
            end_ratio + (1.0 - end_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        )

    return schedule
