"""The last link of every chain: multiply by minus the learning rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import check_non_negative
from ..core.tree_checks import check_real_leaves
from ._arithmetic import cast, increment, scalar, wide, wide_dtype
from ._transformation import transformation


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    count: jax.Array  # int32 scalar, updates made so far under a schedule; 0 without one
    learning_rate: jax.Array  # float32 scalar, that of the last update (before it, of the first)


def evaluate(value: Any, count: jax.Array) -> Any:
    """A scalar or a schedule, at `count`."""
    return value(count) if callable(value) else value


@checked
def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Multiplies updates by :math:`-\eta_t`, in float32 even where the updates are bfloat16.

    ``optax.scale_by_learning_rate`` rounds the rate itself to the updates' dtype first, which for
    bfloat16 changes it by up to 0.4 %. The rate stays in the state, where `with_telemetry` and
    ``optax.tree.get(state, "learning_rate")`` find it.

    Args:
      learning_rate: a non-negative number, or a schedule called with the number of updates made.

    Raises:
      ValueError: if the learning rate is a negative or non-finite number.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_learning_rate(0.5)
      >>> tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))[0]
      Array([-1.], dtype=float32)
    """
    check_non_negative(learning_rate=learning_rate)

    def kept(rate: Any) -> jax.Array:
        return jnp.asarray(rate, jnp.float32)

    def init(params: optax.Params) -> ScaleByLearningRateState:
        check_real_leaves(params)
        count = jnp.zeros([], jnp.int32)
        return ScaleByLearningRateState(count, kept(evaluate(learning_rate, count)))

    def update(
        updates: optax.Updates, state: ScaleByLearningRateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByLearningRateState]:
        del params
        rate = evaluate(learning_rate, state.count)
        scaled = jax.tree.map(
            lambda u: cast(wide(u) * scalar(-rate, wide_dtype(u.dtype)), u.dtype), updates
        )
        if callable(learning_rate):
            return scaled, ScaleByLearningRateState(increment(state.count), kept(rate))
        # Of a constant nothing changes, and what passes through needs no kernel. An array may be another
        # at every update (optax.inject_hyperparams).
        is_number = isinstance(learning_rate, (int, float))
        return scaled, state if is_number else state._replace(learning_rate=kept(rate))

    return transformation(init, update)
