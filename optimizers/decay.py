"""Decoupled weight decay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._arithmetic import cast, increment, scalar, wide_dtype
from ._checks import check_non_negative, check_params_given
from ._transformation import transformation
from .learning_rate import evaluate

Mask = Any | Callable[[optax.Params], Any]


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`."""

    count: jax.Array  # int32 scalar, updates made so far


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    r"""Adds :math:`\lambda_t \theta` to the updates.

    Placed before :func:`scale_by_learning_rate` it is the decay of AdamW as PyTorch and Optax have
    it: :math:`\theta \leftarrow \theta - \eta_t (u_t + \lambda_t \theta)`. The sum is formed in
    float32 and returned in the updates' dtype, so bfloat16 updates and float32 parameters mix.

    Args:
      weight_decay: :math:`\lambda`, a non-negative number or a schedule of the update count.
      mask: a tree of booleans shaped like the parameters (or a prefix), or a function from the
        parameters to one; ``True`` decays. ``None`` decays everything. Masks by role come from
        :func:`ravine.optimizers.roles.mask_by_role`.

    Raises:
      ValueError: if `weight_decay` is a negative or non-finite number, or at the update when the
        parameters are missing.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.add_decayed_weights(0.1)
      >>> params = jnp.array([2.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
      Array([1.2], dtype=float32)
    """
    return _decay(weight_decay, mask, lambda u, p: p)


def decay_or_identity(
    weight_decay: optax.ScalarOrSchedule, mask: Mask | None
) -> optax.GradientTransformation:
    """`add_decayed_weights`, or nothing at all when the decay is the constant zero."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()
    return add_decayed_weights(weight_decay, mask)


def add_cautious_decay(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    r"""Decays only where the update and the decay agree.

    .. math:: u + \lambda_t \, [u \theta \ge 0] \, \theta

    Args:
      weight_decay: :math:`\lambda`, a non-negative number or a schedule of the update count.
      mask: which parameters decay, see :func:`add_decayed_weights`.

    Raises:
      ValueError: as :func:`add_decayed_weights`.

    Source: Chen et al., 2025, https://arxiv.org/abs/2510.12402.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.add_cautious_decay(0.5), jnp.array([2.0, 2.0])
      >>> tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)[0]
      Array([ 2., -1.], dtype=float32)
    """
    return _decay(weight_decay, mask, lambda u, p: jnp.where(u * p >= 0, p, 0))


def _decay(
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask | None,
    decayed_part: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    check_non_negative(weight_decay=weight_decay)

    def init(params: optax.Params) -> AddDecayedWeightsState:
        del params
        return AddDecayedWeightsState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: AddDecayedWeightsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AddDecayedWeightsState]:
        check_params_given(params, "weight decay")
        rate = evaluate(weight_decay, state.count)

        def decayed(u: jax.Array, p: jax.Array) -> jax.Array:
            dtype = wide_dtype(u.dtype, p.dtype)
            part = decayed_part(cast(u, dtype), cast(p, dtype))
            return cast(cast(u, dtype) + scalar(rate, dtype) * part, u.dtype)

        state = AddDecayedWeightsState(increment(state.count))
        return jax.tree.map(decayed, updates, params), state

    tx = transformation(init, update)
    return tx if mask is None else optax.masked(tx, mask)
