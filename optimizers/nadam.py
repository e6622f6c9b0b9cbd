"""NAdam and NAdamW: Adam with Nesterov's look-ahead."""

from typing import Any

import optax

from ..core.arguments import checked
from .adam import adamw
from .links.decay import DecayForm, Mask


@checked
def nadam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam with Nesterov's look-ahead: :func:`scale_by_adam` with ``nesterov=True``.

    A drop-in to try in place of Adam. The same as ``optax.nadam``; ``torch.optim.NAdam`` also has a
    momentum schedule, which cannot be turned off, and is therefore a different algorithm.

    State: 8 bytes per parameter. Starting rates: as for :func:`adamw`.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: as for :func:`scale_by_adam`.

    Returns:
      An ``optax.GradientTransformation``.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.nadam(0.1)
      >>> round(float(tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0][0]), 4)
      -0.1474
    """
    return nadamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        weight_decay=0.0,
    )


@checked
def nadamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""NAdam with weight decay: :func:`adamw` with ``nesterov=True``, and all its other arguments.

    A drop-in to try in place of AdamW.

    State: 8 bytes per parameter. Starting rates: as for :func:`adamw`.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nu_dtype: as for :func:`nadam`.
      weight_decay, weight_decay_mask, weight_decay_form: as for :func:`adamw`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`nadam`; ``optax.nadamw``.

    Example:
      >>> import ravine
      >>> tx = ravine.nadamw(3e-4, b2=0.95, weight_decay=0.1)
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        nesterov=True,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        weight_decay_form=weight_decay_form,
    )
