"""Stochastic gradient descent, with momentum and Nesterov's look-ahead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._arithmetic import cast_like, increment, wide_dtype, wide_zeros_like
from ._checks import check_decay_rates
from ._transformation import transformation
from .decay import Mask, decay_or_identity
from .learning_rate import scale_by_learning_rate


class ScaleByMomentumState(NamedTuple):
    """State of `scale_by_momentum`."""

    count: jax.Array  # int32 scalar, updates made so far
    mu: optax.Updates  # like params, mu_dtype: the velocity


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
    # A traced dampening (optax.inject_hyperparams) cannot be looked at, and may well be zero.
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
            kept, g = jnp.asarray(momentum, dtype) * m.astype(dtype), g.astype(dtype)
            if not has_dampening:
                return kept + g
            damped = kept + jnp.asarray(1 - dampening, dtype) * g
            return jnp.where(state.count == 0, g, damped)

        def look_ahead(g: jax.Array, m: jax.Array) -> jax.Array:
            return g.astype(m.dtype) + jnp.asarray(momentum, m.dtype) * m

        mu = jax.tree.map(accumulate, updates, state.mu)
        direction = jax.tree.map(look_ahead, updates, mu) if nesterov else mu
        state = ScaleByMomentumState(increment(state.count), cast_like(mu, state.mu))
        return cast_like(direction, updates), state

    return transformation(init, update)


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    dampening: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
) -> optax.GradientTransformation:
    r"""Stochastic gradient descent.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` the gradient, or :func:`scale_by_momentum` of it. The decay is decoupled, where
    ``torch.optim.SGD`` adds it to the gradient before the momentum: for that form put
    :func:`add_decayed_weights` in front of ``sgd`` in a chain.

    Args:
      learning_rate: a number or a schedule.
      momentum: :math:`\mu` in [0, 1); 0 keeps no velocity.
      nesterov: look-ahead momentum.
      dampening: :math:`\tau` in [0, 1).
      mu_dtype: dtype of the velocity; by default at least float32.
      weight_decay: :math:`\lambda`, decoupled and multiplied by the learning rate.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.

    Raises:
      ValueError: for hyperparameters out of range, or Nesterov without momentum.

    Source: Robbins and Monro, 1951; defaults of ``torch.optim.SGD``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.sgd(0.1, momentum=0.9, nesterov=True)
      >>> tx.update(jnp.array([1.0]), tx.init(jnp.zeros(1)))[0]
      Array([-0.19], dtype=float32)
    """
    has_momentum = not (isinstance(momentum, (int, float)) and momentum == 0)
    has_dampening = isinstance(dampening, (int, float)) and dampening != 0
    if not has_momentum and (nesterov or has_dampening):
        raise ValueError("nesterov and dampening act on the momentum; give momentum > 0.")
    return optax.chain(
        scale_by_momentum(momentum, nesterov=nesterov, dampening=dampening, mu_dtype=mu_dtype)
        if has_momentum
        else optax.identity(),
        decay_or_identity(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
