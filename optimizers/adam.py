"""Adam and AdamW: a momentum divided by a root mean square, both corrected for their start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import (
    cast_like,
    ema,
    increment,
    momentum,
    over_root,
    wide,
    wide_zeros_like,
)
from ..core.checks import check_decay_rates, check_some_eps
from ..core.transformation import transformation
from .links.decay import DecayForm, Mask, with_decay


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`."""

    count: jax.Array  # int32 scalar, updates made so far
    mu: optax.Updates | None  # like params, mu_dtype: mean of gradients; None where b1 is 0
    nu: optax.Updates  # like params, nu_dtype: mean of squared gradients


@checked
def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    nesterov: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Momentum over root mean square, each corrected for its start from zero.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon_\mathrm{root}} + \epsilon}

    With Nesterov the numerator is :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) +
    (1 - \beta_1) g_t / (1 - \beta_1^t)` (NAdam without its momentum schedule).

    Args:
      b1: :math:`\beta_1` in [0, 1); 0 keeps no first moment.
      b2: :math:`\beta_2` in [0, 1).
      eps: added outside the root.
      eps_root: added inside the root; give it when differentiating through the optimizer.
      nesterov: look-ahead momentum.
      mu_dtype: dtype of the first moment; by default at least float32.
      nu_dtype: dtype of the second moment; by default at least float32. In bfloat16 it stops changing
        once its increments fall below half a unit in the last place.

    Non-finite gradients show in the updates and stay in the moments. An element above 1.8e19 makes its
    second moment infinite, and its steps zero forever; a smaller one decays at the rate `b2`. Put
    :func:`ravine.stability.finite_gate` or :func:`ravine.stability.skip_step` around the chain.

    Raises:
      ValueError: for values out of range, or when both epsilons are zero.

    Source: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980; ``torch.optim.Adam``; Nesterov:
    Dozat, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_adam()
      >>> tx.update(jnp.array([3.0, -0.01]), tx.init(jnp.zeros(2)))[0].round(4)
      Array([ 1., -1.], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)
    check_some_eps(eps, eps_root)
    has_momentum = not (isinstance(b1, (int, float)) and b1 == 0)

    def init(params: optax.Params) -> ScaleByAdamState:
        return ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=wide_zeros_like(params, mu_dtype) if has_momentum else None,
            nu=wide_zeros_like(params, nu_dtype),
        )

    def update(
        updates: optax.Updates, state: ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdamState]:
        del params
        count = increment(state.count)
        nu = ema(updates, state.nu, b2, jax.lax.square)
        if has_momentum:
            mu, mean = momentum(updates, state.mu, b1, count, nesterov=nesterov)
        else:
            mu, mean = None, jax.tree.map(wide, updates)
        found = over_root(mean, nu, b2, count, eps, eps_root), mu, nu
        directions, mu, nu = cast_like(found, (updates, state.mu, state.nu))
        return directions, ScaleByAdamState(count, mu, nu)

    return transformation(init, update)


@checked
def adam(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    nesterov: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Adam, without weight decay: :func:`adamw` with ``weight_decay=0``.

    For reproducing results that used it; for a new run use :func:`adamw`.

    .. math:: \theta_t = \theta_{t-1} - \eta_t u_t, \qquad u_t \text{ as in } \texttt{scale\_by\_adam}

    State: 8 bytes per parameter. Starting rates: as for :func:`adamw`.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, nesterov, mu_dtype, nu_dtype: as for :func:`scale_by_adam`.

    Returns:
      An ``optax.GradientTransformation``.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`scale_by_adam`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.adam(0.1)
      >>> round(float(tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0][0]), 6)
      -0.1
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        weight_decay=0.0,
    )


@checked
def adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    nesterov: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""Adam with decoupled weight decay: the baseline for language models.

    Start here: it works over a wide range of learning rates, and every published recipe can be compared
    with it. Once it is tuned, try :func:`muon` or :func:`soap` for a better loss per token.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \eta_t \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon_\mathrm{root}} + \epsilon}
            + \lambda \theta_{t-1} \right)

    State: 8 bytes per parameter; 6 with ``mu_dtype=jnp.bfloat16``. Starting rates: 1e-4 to 1e-3,
    smaller for larger models (GPT-3: 6e-4 at 125 million parameters, 6e-5 at 175 billion), with
    ``b2=0.95`` and ``weight_decay=0.1`` for language models.

    Args:
      learning_rate: a number or a schedule.
      b1: :math:`\beta_1` in [0, 1).
      b2: :math:`\beta_2` in [0, 1); language models commonly use 0.95.
      eps: added outside the root.
      eps_root: added inside the root.
      nesterov: look-ahead momentum.
      mu_dtype: dtype of the first moment; by default at least float32.
      nu_dtype: dtype of the second moment; by default at least float32.
      weight_decay: :math:`\lambda`, multiplied by the learning rate. PyTorch's default, 1e-2;
        Optax has 1e-4; language models commonly use 0.1.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101; ``torch.optim.AdamW``.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx, params = ravine.adamw(0.1, weight_decay=0.1), jnp.array([2.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = params  # of params**2 / 2
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params.round(4)
      Array([1.6444], dtype=float32)
    """
    return with_decay(
        scale_by_adam(
            b1, b2, eps, eps_root, nesterov=nesterov, mu_dtype=mu_dtype, nu_dtype=nu_dtype
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
