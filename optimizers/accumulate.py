"""Gradient accumulation that leaves the inner optimizer alone until there is something to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._arithmetic import cast, increment, wide, wide_dtype, wide_zeros_like
from ._transformation import with_extra_args


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    count: jax.Array  # int32 scalar, updates emitted so far
    waiting: jax.Array  # int32 scalar, gradients in the buffer
    tokens: jax.Array  # float32 scalar, their weights' sum
    buffer: optax.Updates  # like params, at least float32: their weighted sum
    inner: Any  # the inner optimizer's


def accumulate(
    tx: optax.GradientTransformation, every: int | Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    r"""Collects gradients and updates with their mean, every so many calls.

    .. math:: \bar g = \sum_i w_i g_i \Big/ \sum_i w_i

    Between emissions updates are zero and `tx` does not run at all (``lax.cond``), where
    ``optax.MultiSteps`` runs it at every call and throws the result away. So schedules, bias
    corrections and refreshes count emitted updates. The sum is kept in float32.

    Where all micro-batches are at hand at once, ``ravine.training.gradients`` accumulates inside
    one step and needs no buffer in the state.

    Args:
      tx: the optimizer; wrap the whole chain, clipping included.
      every: micro-steps an update, at least 1, or a function from the updates emitted so far to it.

    Raises:
      ValueError: if `every` is a number below 1.

    The update takes ``tokens=``, the weight of the gradient at hand, if that is a mean over so many
    tokens; by default all weigh the same. Other keyword arguments of the emitting call reach `tx`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.accumulate(ravine.sgd(1.0), every=2)
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> for grads, tokens in ((jnp.array([1.0]), 3), (jnp.array([5.0]), 1)):
      ...     updates, state = tx.update(grads, state, params, tokens=tokens)
      ...     print(updates)
      [0.]
      [-2.]
    """
    if isinstance(every, (int, float)) and every < 1:
        raise ValueError(f"every must be at least 1, got {every!r}.")
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> AccumulateState:
        return AccumulateState(
            count=jnp.zeros([], jnp.int32),
            waiting=jnp.zeros([], jnp.int32),
            tokens=jnp.zeros([], jnp.float32),
            buffer=wide_zeros_like(params),
            inner=inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        *,
        tokens: Any = 1.0,
        **extra: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        weight = jnp.asarray(tokens).astype(jnp.float32)
        total = state.tokens + weight
        waiting = increment(state.waiting)

        def add(g: jax.Array, held: jax.Array) -> jax.Array:
            dtype = wide_dtype(g.dtype, held.dtype)
            return cast(held + cast(g, dtype) * cast(weight, dtype), held.dtype)

        buffer = jax.tree.map(add, updates, state.buffer)

        def emit(buffer: optax.Updates, inner_state: Any) -> tuple[optax.Updates, AccumulateState]:
            by = jnp.where(total > 0, total, 1)
            mean = jax.tree.map(lambda b: b / cast(by, b.dtype), buffer)
            found, inner_state = inner.update(mean, inner_state, params, **extra)
            found = jax.tree.map(lambda u, g: cast(wide(u), g.dtype), found, updates)
            return found, AccumulateState(
                count=increment(state.count),
                waiting=jnp.zeros_like(waiting),
                tokens=jnp.zeros_like(total),
                buffer=jax.tree.map(jnp.zeros_like, buffer),
                inner=inner_state,
            )

        def wait(buffer: optax.Updates, inner_state: Any) -> tuple[optax.Updates, AccumulateState]:
            zeros = jax.tree.map(jnp.zeros_like, updates)
            return zeros, AccumulateState(state.count, waiting, total, buffer, inner_state)

        steps = every(state.count) if callable(every) else every
        return jax.lax.cond(waiting >= steps, emit, wait, buffer, state.inner)

    return with_extra_args(init, update)
