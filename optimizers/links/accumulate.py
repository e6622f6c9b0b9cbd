"""Gradient accumulation that leaves the inner optimizer alone until there is something to do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import cast, cast_like, increment, wide_dtype, wide_zeros_like
from ...core.once import once
from ...core.transformation import with_extra_args


class AccumulateState(NamedTuple):
    """State of `accumulate`."""

    count: jax.Array  # int32 scalar, updates emitted so far
    waiting: jax.Array  # int32 scalar, gradients in the buffer
    tokens: jax.Array  # float32 scalar, their weights' sum
    buffer: optax.Updates  # like params, at least float32: their weighted sum, or the last update
    inner: Any  # the inner optimizer's


@checked
def accumulate(
    tx: optax.GradientTransformation, every: int | Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    r"""Collects gradients, and updates with their mean every few calls.

    .. math:: \bar g = \sum_i w_i g_i \Big/ \sum_i w_i

    Between emissions updates are zero and `tx` does not run at all; ``optax.MultiSteps`` runs it at
    every call and discards the result. So schedules, bias corrections and refreshes count emitted
    updates. The sum is kept in float32. It cannot be differentiated in reverse mode.

    If all micro-batches are available at once, ``ravine.training.gradients`` accumulates inside
    one step and needs no buffer in the state.

    Args:
      tx: the optimizer; wrap the whole chain, clipping included.
      every: micro-steps per update, at least 1, or a function of the number of updates emitted so far.

    Raises:
      ValueError: if `every` is a number below 1.

    The update takes ``tokens=``, the weight of the current gradient: the number of tokens over which it
    is a mean; by default all gradients have the same weight. Other keyword arguments of the emitting
    call reach `tx`.

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
            so_far = jnp.where(state.waiting == 0, 0, cast(held, dtype))
            # The mean over no tokens is often not a number.
            added = jnp.where(weight == 0, 0, cast(g, dtype) * cast(weight, dtype))
            return cast(so_far + added, held.dtype)

        buffer = jax.tree.map(add, updates, state.buffer)
        emits = waiting >= (every(state.count) if callable(every) else every)

        def run(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            buffer, inner_state = carry
            by = jnp.where(total > 0, total, 1)
            mean = jax.tree.map(lambda b: b / cast(by, b.dtype), buffer)
            found, inner_state = inner.update(mean, inner_state, params, **extra)
            return cast_like(found, buffer), inner_state

        # One buffer holds first the sum and then the update, and changes in place, so that other calls
        # allocate nothing of the parameters' size.
        _, (buffer, inner_state) = once(emits, run, (buffer, state.inner))
        emitted = jax.tree.map(lambda b, g: cast(jnp.where(emits, b, 0), g.dtype), buffer, updates)
        return emitted, AccumulateState(
            count=jnp.where(emits, increment(state.count), state.count),
            waiting=jnp.where(emits, 0, waiting),
            tokens=jnp.where(emits, 0, total),
            buffer=buffer,
            inner=inner_state,
        )

    return with_extra_args(init, update)
