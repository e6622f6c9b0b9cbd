"""The last link of every chain: multiply by minus the learning rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...core.arguments import checked
from ...core.arithmetic import increment, wide_dtype, widest
from ...core.checks import check_non_negative
from ...core.transformation import transformation
from ...core.tree_checks import check_real_leaves


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    count: jax.Array  # int32 scalar, updates so far, including skipped ones
    # Float32 scalars (float64 with x64).
    learning_rate: jax.Array  # that of the last update (before any, of the first)
    scheduled: (
        jax.Array
    )  # what the number or schedule said then; differs if the rate was set by hand


class FallbackLearningRateState(NamedTuple):
    """The same state within the fallback of another optimizer, under a separate name."""

    count: jax.Array
    fallback_learning_rate: jax.Array
    scheduled: jax.Array


class InjectedLearningRateState(NamedTuple):
    """The same state within `inject_hyperparams`, which holds the rate that users set."""

    count: jax.Array
    injected_learning_rate: jax.Array
    scheduled: jax.Array


RATE_STATES = (ScaleByLearningRateState, FallbackLearningRateState, InjectedLearningRateState)


def evaluate(value: Any, count: jax.Array) -> Any:
    """A scalar or a schedule, at `count`.

    Raises:
      ValueError: for a schedule that returns no number.
    """
    if not callable(value):
        return value
    found: Any = value(count)
    if found is None or np.shape(found):
        what = "None" if found is None else f"an array of shape {np.shape(found)}"
        raise ValueError(f"a schedule must return a number for a count of updates, but got {what}.")
    return found


def in_words(value: Any) -> str:
    """A scalar, or a schedule and its first value."""
    if not callable(value):
        return f"{value:g}" if isinstance(value, (int, float)) else "an array"
    with jax.ensure_compile_time_eval():
        return f"schedule from {float(jnp.asarray(evaluate(value, jnp.zeros([], jnp.int32)))):g}"


@checked
def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Multiplies updates by :math:`-\eta_t`, in float32 even where the updates are bfloat16.

    ``optax.scale_by_learning_rate`` rounds the rate itself to the updates' dtype first, which for
    bfloat16 changes it by up to 0.4 %.

    The rate that was used stays in the state, where `with_telemetry` and ``optax.tree.get(state,
    "learning_rate")`` find it. ``optax.tree.set(state, learning_rate=0.1)`` sets it: that rate is then
    used until it is set again; to return to the builder's number or schedule, set it to the state's
    ``scheduled``. The count advances at every update, even with a constant rate, so a schedule can take
    over a run.

    Args:
      learning_rate: a non-negative number, or a schedule called with the number of updates so far.
    Raises:
      ValueError: if the learning rate is a negative or non-finite number.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx = ravine.scale_by_learning_rate(0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> tx.update(jnp.array([2.0]), state)[0]
      Array([-1.], dtype=float32)
      >>> tx.update(jnp.array([2.0]), optax.tree.set(state, learning_rate=0.25))[0]
      Array([-0.5], dtype=float32)
    """
    check_non_negative(learning_rate=learning_rate)

    def init(params: optax.Params) -> ScaleByLearningRateState:
        check_real_leaves(params)
        count = jnp.zeros([], jnp.int32)
        # Separate arrays, so that each may be donated.
        rates = [jnp.array(evaluate(learning_rate, count), widest()) for _ in range(2)]
        return ScaleByLearningRateState(count, *rates)

    def update(
        updates: optax.Updates, state: ScaleByLearningRateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByLearningRateState]:
        del params
        now, kept = evaluate(learning_rate, state.count), state.scheduled.dtype
        scheduled, held = (jnp.asarray(rate).astype(kept) for rate in (now, state.learning_rate))
        is_held = ~jnp.array_equal(held, state.scheduled, equal_nan=True)
        rate = jnp.where(is_held, held, scheduled)

        def scaled(u: jax.Array) -> jax.Array:
            dtype = wide_dtype(u.dtype)
            return (u.astype(dtype) * -rate.astype(dtype)).astype(u.dtype)

        state = ScaleByLearningRateState(increment(state.count), rate, scheduled)
        return jax.tree.map(scaled, updates), state

    def describe(params: optax.Params) -> dict[str, str]:
        del params
        return {"learning rate": in_words(learning_rate)}

    return transformation(init, update, describe)


def as_fallback(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, with its rate in the state named ``fallback_learning_rate``.

    So ``optax.tree.get(state, "learning_rate")`` finds one rate, that of the main optimizer. A fallback
    without parameters keeps its first rate, see `by_role`.
    """
    return _with_rate_as(FallbackLearningRateState, tx)


def as_injected(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, with its rate in the state named ``injected_learning_rate``."""
    return _with_rate_as(InjectedLearningRateState, tx)


def _with_rate_as(
    kind: type[Any], tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> Any:
        return renamed(inner.init(params), ScaleByLearningRateState, kind)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        state = renamed(state, kind, ScaleByLearningRateState)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, renamed(state, ScaleByLearningRateState, kind)

    def renamed(state: Any, old: type[Any], new: type[Any]) -> Any:
        is_old = lambda node: isinstance(node, old)
        return jax.tree.map(lambda x: new(*x) if is_old(x) else x, state, is_leaf=is_old)

    return optax.GradientTransformationExtraArgs(init, update)
