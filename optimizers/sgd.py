"""Stochastic gradient descent, with momentum and Nesterov's look-ahead."""

from typing import Any

import optax

from ..core.arguments import checked
from .links.decay import DecayForm, Mask, with_decay
from .links.momentum import scale_by_momentum


@checked
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    dampening: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""Stochastic gradient descent.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` the gradient, or :func:`scale_by_momentum` of it. By default the decay is
    decoupled, where ``torch.optim.SGD`` adds it to the gradient before the momentum: that is
    ``weight_decay_form="l2"``.

    Args:
      learning_rate: a number or a schedule.
      momentum: :math:`\mu` in [0, 1); 0 keeps no velocity.
      nesterov: look-ahead momentum.
      dampening: :math:`\tau` in [0, 1).
      mu_dtype: dtype of the velocity; by default at least float32.
      weight_decay: :math:`\lambda`, by default decoupled and multiplied by the learning rate.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      weight_decay_form: how, see :func:`add_decayed_weights`.

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
    return with_decay(
        scale_by_momentum(momentum, nesterov=nesterov, dampening=dampening, mu_dtype=mu_dtype)
        if has_momentum
        else optax.identity(),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
