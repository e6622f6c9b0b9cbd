"""Lion: the sign of an interpolated momentum."""

from typing import Any, NamedTuple

import jax
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast_like, ema, sign, wide_zeros_like
from ..core.checks import check_decay_rates
from ..core.transformation import transformation
from .links.decay import DecayForm, Mask, with_decay


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`."""

    mu: optax.Updates  # like params, mu_dtype: mean of gradients


@checked
def scale_by_lion(
    b1: float = 0.9, b2: float = 0.99, *, mu_dtype: Any = None
) -> optax.GradientTransformation:
    r"""Sign of an interpolated momentum.

    .. math::
        u_t = \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    The direction uses the old momentum. A coordinate does not move while all its gradients have been
    zero.

    Args:
      b1: :math:`\beta_1` in [0, 1), for the direction.
      b2: :math:`\beta_2` in [0, 1), for the momentum.
      mu_dtype: dtype of the momentum; by default at least float32.

    Raises:
      ValueError: for decay rates outside [0, 1).

    Source: Chen et al., 2023, https://arxiv.org/abs/2302.06675; google/automl, ``lion_optax.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_lion()
      >>> tx.update(jnp.array([3.0, -0.1, 0.0]), tx.init(jnp.zeros(3)))[0]
      Array([ 1., -1.,  0.], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)

    def init(params: optax.Params) -> ScaleByLionState:
        return ScaleByLionState(mu=wide_zeros_like(params, mu_dtype))

    def update(
        updates: optax.Updates, state: ScaleByLionState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByLionState]:
        del params
        direction = jax.tree.map(sign, ema(updates, state.mu, b1))
        mu = ema(updates, state.mu, b2)
        return cast_like(direction, updates), ScaleByLionState(cast_like(mu, state.mu))

    return transformation(init, update)


@checked
def lion(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.9,
    b2: float = 0.99,
    *,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""Lion with decoupled weight decay: the sign of a momentum, half the state of AdamW.

    For runs that are short of memory for state. It is sensitive to its schedule, since every step
    moves every coordinate by the full learning rate, whatever the gradient.

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t \\
        \theta_t &= \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    State: 4 bytes per parameter; 2 with ``mu_dtype=jnp.bfloat16``. Starting rates: a third to a tenth
    of AdamW's, with a decay that is larger by the same factor.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, mu_dtype: as for :func:`scale_by_lion`.
      weight_decay: :math:`\lambda`, multiplied by the learning rate. The official default, 0;
        Optax has 1e-3.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`scale_by_lion`.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx, params = ravine.lion(0.1), jnp.array([2.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = params  # of params**2 / 2
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params.round(4)
      Array([1.6999999], dtype=float32)
    """
    return with_decay(
        scale_by_lion(b1, b2, mu_dtype=mu_dtype),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
