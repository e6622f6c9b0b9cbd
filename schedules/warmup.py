"""Warm-up: a ramp in front of any schedule."""

import jax.numpy as jnp
import optax


def warmup(body: optax.Schedule, steps: int, *, from_zero: bool = False) -> optax.Schedule:
    r"""A linear ramp over `steps` updates to the value at which `body` starts.

    .. math:: \eta_t = \tfrac{t + 1}{W} \, \mathrm{body}(0) \quad (t < W), \qquad
        \eta_t = \mathrm{body}(t - W) \quad (t \ge W)

    Args:
      body: a schedule, counted from the end of the ramp.
      steps: :math:`W`, the length of the ramp in updates; 0 means none.
      from_zero: ramp by :math:`t / W` instead, whose first update does nothing (Optax, Hugging
        Face).

    Raises:
      ValueError: if `steps` is not a whole number of at least 0.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.warmup(ravine.schedules.linear(1.0, 2), 2)
      >>> [float(schedule(t)) for t in range(5)]
      [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}.")
    if steps == 0:
        return body

    def schedule(count):
        count = jnp.asarray(count)
        ramp = (count + (0 if from_zero else 1)).astype(jnp.float32) / steps
        return jnp.where(count < steps, ramp * body(0), body(jnp.maximum(count - steps, 0)))

    return schedule
