"""AdaGrad: each coordinate divided by the root of the sum of its squared gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, cast_like, root, wide_dtype, wide_zeros_like
from ..core.checks import check_non_negative, check_some_eps
from ..core.transformation import transformation
from .links.decay import DecayForm, Mask, with_decay


class ScaleByAdagradState(NamedTuple):
    """State of `scale_by_adagrad`."""

    nu: optax.Updates  # like params, nu_dtype: the sum of squared gradients


@checked
def scale_by_adagrad(
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    *,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Divides by the root of the running sum of squares.

    .. math::
        a_t = a_{t-1} + g_t^2, \qquad
        u_t = \frac{g_t}{\sqrt{a_t + \epsilon_\mathrm{root}} + \epsilon}

    Defaults are PyTorch's. Optax starts at :math:`a_0 = 0.1` with 1e-7 inside the root:
    ``scale_by_adagrad(0.1, eps=0.0, eps_root=1e-7)``.

    Args:
      initial_accumulator_value: :math:`a_0`, not negative.
      eps: added outside the root.
      eps_root: added inside the root.
      nu_dtype: dtype of the accumulator; by default at least float32.

    Raises:
      ValueError: for negative values, or when both epsilons are zero.

    Source: Duchi et al., 2011, https://jmlr.org/papers/v12/duchi11a.html; ``torch.optim.Adagrad``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_adagrad()
      >>> tx.update(jnp.array([3.0, -0.1]), tx.init(jnp.zeros(2)))[0]
      Array([ 1., -1.], dtype=float32)
    """
    check_non_negative(initial_accumulator_value=initial_accumulator_value)
    check_some_eps(eps, eps_root)

    def init(params: optax.Params) -> ScaleByAdagradState:
        zeros = wide_zeros_like(params, nu_dtype)
        return ScaleByAdagradState(
            jax.tree.map(lambda z: jnp.full_like(z, initial_accumulator_value), zeros)
        )

    def update(
        updates: optax.Updates, state: ScaleByAdagradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdagradState]:
        del params

        def add_square(g: jax.Array, a: jax.Array) -> jax.Array:
            dtype = wide_dtype(g.dtype, a.dtype)
            return cast(a, dtype) + jax.lax.square(cast(g, dtype))

        nu = jax.tree.map(add_square, updates, state.nu)
        direction = jax.tree.map(
            lambda g, a: cast(g, a.dtype) / root(a, eps, eps_root), updates, nu
        )
        return cast_like(direction, updates), ScaleByAdagradState(cast_like(nu, state.nu))

    return transformation(init, update)


@checked
def adagrad(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    *,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""AdaGrad with decoupled weight decay.

    For sparse features: coordinates that are rarely active keep large steps. Steps shrink forever as
    squares add up.

    .. math::
        a_t = a_{t-1} + g_t^2, \qquad
        \theta_t = \theta_{t-1} - \eta_t \left( \frac{g_t}
            {\sqrt{a_t + \epsilon_\mathrm{root}} + \epsilon} + \lambda \theta_{t-1} \right)

    State: 4 bytes per parameter. Starting rates: 1e-2 to 1e-1.

    Args:
      learning_rate: a number or a schedule.
      initial_accumulator_value, eps, eps_root, nu_dtype: as for :func:`scale_by_adagrad`.
      weight_decay: :math:`\lambda`, by default decoupled and multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`scale_by_adagrad`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.adagrad(0.1)
      >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
      Array([-0.1], dtype=float32)
    """
    return with_decay(
        scale_by_adagrad(initial_accumulator_value, eps, eps_root, nu_dtype=nu_dtype),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
