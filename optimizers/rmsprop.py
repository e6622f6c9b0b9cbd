"""RMSProp: each coordinate divided by a running root mean square of its gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, cast_like, ema, root, wide_zeros_like
from ..core.checks import check_decay_rates, check_some_eps
from ..core.transformation import transformation
from .links.decay import DecayForm, Mask, with_decay
from .links.momentum import scale_by_momentum


class ScaleByRmspropState(NamedTuple):
    """State of `scale_by_rmsprop`."""

    nu: optax.Updates  # like params, nu_dtype: mean of squared gradients
    mu: optax.Updates | None  # like params, nu_dtype: mean of gradients when centered


@checked
def scale_by_rmsprop(
    b2: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    centered: bool = False,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Divides by the running root mean square.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        u_t = \frac{g_t}{\sqrt{v_t - c_t^2 + \epsilon_\mathrm{root}} + \epsilon}

    where :math:`c_t = \beta_2 c_{t-1} + (1 - \beta_2) g_t` when centered and 0 otherwise. Defaults
    are PyTorch's. Optax has 0.9 and 1e-8 inside the root:
    ``scale_by_rmsprop(0.9, eps=0.0, eps_root=1e-8)``.

    Args:
      b2: :math:`\beta_2` in [0, 1).
      eps: added outside the root.
      eps_root: added inside the root.
      centered: subtract the squared mean, which estimates the variance. Rounding that would make
        the difference negative is clipped to zero.
      nu_dtype: dtype of the moments; by default at least float32.

    Raises:
      ValueError: for values out of range, or when both epsilons are zero.

    Source: Hinton, lecture 6e, 2012; Graves, 2013, https://arxiv.org/abs/1308.0850 (centered);
    ``torch.optim.RMSprop``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_rmsprop(0.75)
      >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
      Array([2.], dtype=float32)
    """
    check_decay_rates(b2=b2)
    check_some_eps(eps, eps_root)

    def init(params: optax.Params) -> ScaleByRmspropState:
        return ScaleByRmspropState(
            nu=wide_zeros_like(params, nu_dtype),
            mu=wide_zeros_like(params, nu_dtype) if centered else None,
        )

    def update(
        updates: optax.Updates, state: ScaleByRmspropState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByRmspropState]:
        del params
        nu = ema(updates, state.nu, b2, jax.lax.square)
        spread, mu = nu, None
        if centered:
            mean = ema(updates, state.mu, b2)
            spread = jax.tree.map(lambda v, c: jnp.maximum(v - jnp.square(c), 0), nu, mean)
            mu = cast_like(mean, state.mu)
        direction = jax.tree.map(
            lambda g, v: cast(g, v.dtype) / root(v, eps, eps_root), updates, spread
        )
        return cast_like(direction, updates), ScaleByRmspropState(cast_like(nu, state.nu), mu)

    return transformation(init, update)


@checked
def rmsprop(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    b2: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    centered: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""RMSProp, with momentum on the scaled gradient and decoupled weight decay.

    For small and recurrent nets, and for reproducing results that used it; Adam also corrects the first
    steps for the start from zero.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (m_t + \lambda \theta_{t-1}), \qquad
        m_t = \mu m_{t-1} + u_t

    with :math:`u_t` of :func:`scale_by_rmsprop`.

    State: 4 bytes per parameter, plus 4 with momentum and 4 when centered. Starting rates: 1e-3.

    Args:
      learning_rate: a number or a schedule.
      b2: :math:`\beta_2` in [0, 1); PyTorch calls it ``alpha``, Optax ``decay``.
      eps, eps_root, centered, nu_dtype: as for :func:`scale_by_rmsprop`.
      momentum: :math:`\mu` in [0, 1); 0 keeps no velocity.
      nesterov: look-ahead momentum.
      mu_dtype: dtype of the velocity; by default at least float32.
      weight_decay: :math:`\lambda`, by default decoupled and multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range, or Nesterov without momentum.

    The velocity is scaled by the current learning rate, as in PyTorch; ``optax.rmsprop`` scales what
    enters the velocity, which differs once the rate changes.

    Source: as :func:`scale_by_rmsprop`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.rmsprop(0.1, b2=0.75)
      >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
      Array([-0.2], dtype=float32)
    """
    has_momentum = not (isinstance(momentum, (int, float)) and momentum == 0)
    if nesterov and not has_momentum:
        raise ValueError("nesterov acts on the momentum; give momentum > 0.")
    return with_decay(
        optax.chain(
            scale_by_rmsprop(b2, eps, eps_root, centered=centered, nu_dtype=nu_dtype),
            scale_by_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype)
            if has_momentum
            else optax.identity(),
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
