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
    r"""Stochastic gradient descent, optionally with momentum.

    For convolutional nets, for minimal memory, and as a control. Transformers learn more slowly with it
    than with any optimizer that rescales coordinates.

    .. math::
        v_t = \mu v_{t-1} + (1 - \tau) g_t, \qquad
        \theta_t = \theta_{t-1} - \eta_t \, (v_t + \lambda \theta_{t-1})

    with :math:`\mu v_t + (1 - \tau) g_t` in place of :math:`v_t` under Nesterov, and the gradient
    itself without momentum; see :func:`scale_by_momentum`. By default the decay is decoupled;
    ``torch.optim.SGD`` adds it to the gradient before the momentum, which is ``weight_decay_form="l2"``
    here.

    State: none without momentum, 4 bytes per parameter with it. Starting rates: 0.1 to 1.

    Args:
      learning_rate: a number or a schedule.
      momentum: :math:`\mu` in [0, 1); 0 keeps no velocity.
      nesterov: look-ahead momentum.
      dampening: :math:`\tau` in [0, 1).
      mu_dtype: dtype of the velocity; by default at least float32.
      weight_decay: :math:`\lambda`, by default decoupled and multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range, or Nesterov without momentum.

    Source: Robbins and Monro, 1951; defaults of ``torch.optim.SGD``.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx, params = ravine.sgd(0.1, momentum=0.9, nesterov=True), jnp.array([2.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = params  # of params**2 / 2
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params.round(4)
      Array([0.65459996], dtype=float32)
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
