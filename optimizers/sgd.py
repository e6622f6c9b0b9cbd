"""Stochastic gradient descent, with momentum and Nesterov's look-ahead."""

from typing import Any

import optax

from .decay import Mask, decay_or_identity
from .learning_rate import scale_by_learning_rate
from .momentum import scale_by_momentum


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
