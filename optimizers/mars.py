"""MARS: variance reduction by the change of the gradient, in front of any adaptive direction."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, cast_like, scalar, wide, wide_dtype, wide_zeros_like
from ..core.checks import check_decay_rates, check_non_negative
from ..core.transformation import transformation
from .adam import scale_by_adam
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask
from .matrix.shape.layout import MatrixAxes
from .matrix.shape.matrices import Axes, axes_of_leaves
from .roles import IN_OUT, MATRIX_ROLES, Role, Rules, complete, decide


class ReduceVarianceState(NamedTuple):
    """State of `reduce_variance`."""

    previous: optax.Updates  # like params, at least float32: the last gradient


@checked
def reduce_variance(
    gamma: float = 0.025, b1: float = 0.95, *, rules: Rules | None = None
) -> optax.GradientTransformation:
    r"""Adds a share of the gradient's change, and clips every matrix to norm 1.

    .. math::
        c_t = g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}), \qquad
        \tilde c_t = c_t / \max(1, \lVert c_t \rVert)

    with :math:`g_0 = 0`. The previous gradient approximates the gradient of the previous parameters on
    this batch, which the exact form uses; this is the authors' ``is_approx=True``. In front of
    :func:`scale_by_adam` it makes MARS-AdamW, in front of :func:`scale_by_ema_momentum` and a sign
    MARS-Lion, and in front of :func:`muon` MARS-Shampoo.

    Args:
      gamma: :math:`\gamma`, not negative.
      b1: :math:`\beta_1` in [0, 1), the rate of the momentum that follows.
      rules: role rules, which say which axes of a leaf are batch axes, so that stacked layers are
        clipped one by one; None clips every leaf as a whole.

    Raises:
      ValueError: for values out of range, or at the update for leaves that no rule covers.

    Source: Yuan et al., 2024, https://arxiv.org/abs/2411.10438; AGI-Arena/MARS, ``mars.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.reduce_variance()
      >>> tx.update(jnp.array([0.2]), tx.init(jnp.zeros(1)))[0].round(4)
      Array([0.295], dtype=float32)
    """
    if rules is None:
        return _reduce_variance(gamma, b1, lambda tree: [None] * len(jax.tree.leaves(tree)))
    complete(rules)
    return _reduce_variance(
        gamma, b1, lambda tree: [d.axes or IN_OUT for d in decide(tree, rules, MATRIX_ROLES)]
    )


def _reduce_variance(
    gamma: float, b1: float, axes_of: Callable[[Any], Sequence[MatrixAxes | None]]
) -> optax.GradientTransformation:
    """`reduce_variance`, with a function that finds rows and columns; None clips leaves whole."""
    check_non_negative(gamma=gamma)
    check_decay_rates(b1=b1)

    def init(params: optax.Params) -> ReduceVarianceState:
        return ReduceVarianceState(wide_zeros_like(params))

    def update(
        updates: optax.Updates, state: ReduceVarianceState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ReduceVarianceState]:
        del params
        share = gamma * (b1 / (1 - b1))

        def corrected(g: jax.Array, last: jax.Array, axes: MatrixAxes | None) -> jax.Array:
            dtype = wide_dtype(g.dtype, last.dtype)
            change = cast(g, dtype) - cast(last, dtype)
            c = cast(g, dtype) + scalar(share, dtype) * change
            within = None if axes is None else _matrix_axes(axes, g)
            norm = jnp.sqrt(jnp.sum(jnp.square(c), within, keepdims=True))
            return cast(c / jnp.maximum(norm, 1), g.dtype)

        leaves, structure = jax.tree.flatten(updates)
        last = structure.flatten_up_to(state.previous)
        found = jax.tree.unflatten(structure, map(corrected, leaves, last, axes_of(updates)))
        previous = cast_like(jax.tree.map(wide, updates), state.previous)
        return found, ReduceVarianceState(previous)

    return transformation(init, update)


def _matrix_axes(axes: MatrixAxes, leaf: jax.Array) -> tuple[int, ...]:
    """The axes of `leaf` that are rows or columns; all axes of a vector or scalar."""
    return tuple({a % leaf.ndim for a in axes.rows + axes.columns if -leaf.ndim <= a < leaf.ndim})


@checked
def mars(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.99,
    gamma: float = 0.025,
    eps: float = 1e-8,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    rules: Rules | None = None,
    roles: Collection[Role] = ("matrix", "convolution", "embedding", "head"),
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
) -> optax.GradientTransformation:
    r"""MARS-AdamW for matrices, embeddings and heads, AdamW for everything else.

    For noisy gradients: each is corrected by its difference from the previous one before Adam uses it.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` of :func:`scale_by_adam` after :func:`reduce_variance`.

    State: 12 bytes per parameter. Starting rates: the authors' 3e-3, or AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, mu_dtype, nu_dtype: as for :func:`scale_by_adam`.
      gamma: :math:`\gamma`, of the variance reduction.
      weight_decay: :math:`\lambda`, multiplied by the learning rate; also that of the default
        fallback, for which the official default is 0.1.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      rules: role rules; by default ``ravine.COMMON_RULES``.
      roles: the roles that MARS takes. The official file takes 2-D parameters, or everything with
        ``optimize_1d``.
      fallback: the optimizer of all others: complete with its learning rate, or AdamW with the options
        of :class:`ravine.Fallback`, by default the official one, with b1 0.9 and b2 0.95.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for hyperparameters out of range, or at `init` for parameters that no rule covers.

    Source: as :func:`reduce_variance`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.mars(weight_decay=0.1)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            _reduce_variance(gamma, b1, lambda tree: axes_of_leaves(tree, axes)),
            scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        )

    return by_role(
        "mars",
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=roles,
        fallback=fallback,
        vectors=True,
    )
