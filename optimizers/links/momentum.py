"""Momentum: the heavy ball, and the exponential moving average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import (
    cast,
    cast_like,
    ema,
    increment,
    lerp,
    scalar,
    wide_dtype,
    wide_zeros_like,
)
from ...core.checks import check_decay_rates
from ...core.transformation import transformation


class ScaleByMomentumState(NamedTuple):
    """State of `scale_by_momentum`."""

    count: jax.Array  # int32 scalar, updates made so far
    mu: optax.Updates  # like params, mu_dtype: the velocity


@checked
def scale_by_momentum(
    momentum: float = 0.9,
    *,
    nesterov: bool = False,
    dampening: float = 0.0,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Heavy-ball momentum.

    .. math::
        m_1 = g_1, \qquad m_t = \mu m_{t-1} + (1 - \tau) g_t, \qquad
        u_t = \begin{cases} g_t + \mu m_t & \text{Nesterov} \\ m_t & \text{otherwise} \end{cases}

    The first step is not dampened, as in PyTorch. ``optax.trace`` is the case :math:`\tau = 0`.

    Args:
      momentum: :math:`\mu` in [0, 1).
      nesterov: take the look-ahead form; it needs ``dampening=0``.
      dampening: :math:`\tau` in [0, 1).
      mu_dtype: dtype of the velocity; by default at least float32.

    Raises:
      ValueError: for a momentum or dampening outside [0, 1), or Nesterov with dampening.

    Source: Sutskever et al., 2013, https://proceedings.mlr.press/v28/sutskever13.html; the
    recurrence is that of ``torch.optim.SGD``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_momentum(0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> _, state = tx.update(jnp.array([1.0]), state)
      >>> tx.update(jnp.array([1.0]), state)[0]
      Array([1.5], dtype=float32)
    """
    check_decay_rates(momentum=momentum, dampening=dampening)
    has_dampening = not (isinstance(dampening, (int, float)) and dampening == 0)
    # A traced dampening (optax.inject_hyperparams) cannot be inspected, and may be zero.
    if nesterov and isinstance(dampening, (int, float)) and has_dampening:
        raise ValueError(
            f"nesterov=True needs dampening=0, got dampening={dampening!r}; drop one of the two."
        )

    def init(params: optax.Params) -> ScaleByMomentumState:
        return ScaleByMomentumState(jnp.zeros([], jnp.int32), wide_zeros_like(params, mu_dtype))

    def update(
        updates: optax.Updates, state: ScaleByMomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMomentumState]:
        del params

        def accumulate(g: jax.Array, m: jax.Array) -> jax.Array:
            dtype = wide_dtype(g.dtype, m.dtype)
            kept, g = scalar(momentum, dtype) * cast(m, dtype), cast(g, dtype)
            if not has_dampening:
                return kept + g
            damped = kept + scalar(1 - dampening, dtype) * g
            return jnp.where(state.count == 0, g, damped)

        def look_ahead(g: jax.Array, m: jax.Array) -> jax.Array:
            return cast(g, m.dtype) + scalar(momentum, m.dtype) * m

        mu = jax.tree.map(accumulate, updates, state.mu)
        direction = jax.tree.map(look_ahead, updates, mu) if nesterov else mu
        direction, mu = cast_like((direction, mu), (updates, state.mu))
        return direction, ScaleByMomentumState(increment(state.count), mu)

    return transformation(init, update)


class ScaleByEmaMomentumState(NamedTuple):
    """State of `scale_by_ema_momentum`."""

    mu: optax.Updates  # like params, mu_dtype: mean of gradients


@checked
def scale_by_ema_momentum(
    b1: float = 0.95, *, nesterov: bool = False, mu_dtype: Any = None
) -> optax.GradientTransformation:
    r"""Exponential moving average, not corrected for its start.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        u_t = \begin{cases} \beta_1 m_t + (1 - \beta_1) g_t & \text{Nesterov} \\ m_t &
            \text{otherwise} \end{cases}

    It is :math:`1 - \beta_1` times the heavy ball of :func:`scale_by_momentum`, which makes no
    difference if the next link does not depend on scale, such as orthogonalization.

    Args:
      b1: :math:`\beta_1` in [0, 1).
      nesterov: look-ahead momentum.
      mu_dtype: dtype of the average; by default at least float32.

    Raises:
      ValueError: for a decay rate outside [0, 1).

    Source: Keller Jordan, ``muon.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_ema_momentum(0.75)
      >>> tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))[0]
      Array([0.25], dtype=float32)
    """
    check_decay_rates(b1=b1)

    def init(params: optax.Params) -> ScaleByEmaMomentumState:
        return ScaleByEmaMomentumState(wide_zeros_like(params, mu_dtype))

    def update(
        updates: optax.Updates, state: ScaleByEmaMomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByEmaMomentumState]:
        del params
        mu = ema(updates, state.mu, b1)
        direction = jax.tree.map(lambda g, m: lerp(g, m, b1), updates, mu) if nesterov else mu
        direction, mu = cast_like((direction, mu), (updates, state.mu))
        return direction, ScaleByEmaMomentumState(mu)

    return transformation(init, update)
