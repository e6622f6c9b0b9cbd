"""Gradients of a batch that does not fit, micro-batch by micro-batch, inside one step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..core.arithmetic import wide_dtype, wide_zeros_like
from ..stability import MicroBatches


def micro_batch_value_and_grad(
    loss: Callable[[Any, Any], Any],
    micro_batches: int,
    tokens: Callable[[Any], Any] = lambda batch: 1.0,
    *,
    has_aux: bool = False,
    measure: Callable[[Any], Mapping[str, jax.Array]] | None = None,
) -> Callable[[Any, Any], tuple[Any, ...]]:
    r"""``jax.value_and_grad(loss, has_aux=has_aux)`` with the memory of one micro-batch.

    A ``lax.scan`` over micro-batches sums in at least float32, so there is one optimizer step, one tick
    of the schedule and no buffer in the optimizer's state:

    .. math:: \bar g = \sum_i w_i g_i \Big/ \sum_i w_i

    Rows are assigned in turn, row r to micro-batch r mod n, so that a batch sharded over its rows
    stays where it is.

    Args:
      loss: from parameters and a batch to its mean loss.
      micro_batches: n, a divisor of the batch's leading axis; 1 for ``jax.value_and_grad`` itself.
      tokens: from a micro-batch to w, the number of tokens its loss is the mean of; by default all
        micro-batches weigh the same.
      has_aux: whether the loss comes with something else, which is returned of every micro-batch, along
        a new first axis of length n.
      measure: from the gradient of a micro-batch to named scalars, such as
        :func:`ravine.stability.squared_norms`.

    Returns:
      A function from parameters and a batch to the loss and gradients in the parameters' dtypes; with
      `measure`, and to :class:`ravine.stability.MicroBatches` of what was measured and the weights, for
      :func:`ravine.stability.with_noise_scale`.

    Raises:
      ValueError: for less than one micro-batch, only one with `measure`, or when called with a batch
        that they do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.training.gradients import micro_batch_value_and_grad
      >>> loss = lambda w, batch: jnp.mean(w * batch)
      >>> loss_and_grads = micro_batch_value_and_grad(loss, micro_batches=2)
      >>> loss_and_grads(jnp.float32(1.0), jnp.arange(4.0))
      (Array(1.5, dtype=float32), Array(1.5, dtype=float32))
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches!r}.")
    if measure is not None and micro_batches < 2:
        raise ValueError(
            "measure compares the micro-batches of a step, and there is only one; take at least 2."
        )
    value_and_grad = jax.value_and_grad(loss, has_aux=has_aux)

    def dealt(x: jax.Array) -> jax.Array:
        if x.shape[0] % micro_batches:
            raise ValueError(
                f"{micro_batches} micro-batches do not divide a batch of {x.shape[0]}; choose a divisor."
            )
        return jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)

    def whole(params: Any, batch: Any) -> tuple[Any, ...]:
        value, grads = value_and_grad(params, batch)
        if has_aux:
            value = value[0], jax.tree.map(lambda x: x[None], value[1])
        return value, grads

    def mean(params: Any, batch: Any) -> tuple[Any, ...]:
        def add(sums: Any, micro_batch: Any) -> tuple[Any, Any]:
            weight = jnp.asarray(tokens(micro_batch)).astype(jnp.float32)
            value, grads = value_and_grad(params, micro_batch)
            value, aux = value if has_aux else (value, None)
            found = (value, grads, jnp.ones([], jnp.float32))

            def added(sum_: jax.Array, x: jax.Array) -> jax.Array:
                # The mean over no tokens is often not a number.
                x, by = x.astype(sum_.dtype), weight.astype(sum_.dtype)
                return sum_ + jnp.where(by == 0, 0, by * x)

            measured = None if measure is None else (measure(grads), weight)
            return jax.tree.map(added, sums, found), (aux, measured)

        micro = jax.tree.map(dealt, batch)
        widest = wide_dtype(*(p.dtype for p in jax.tree.leaves(params)))
        start = (jnp.zeros([], widest), wide_zeros_like(params), jnp.zeros([], jnp.float32))
        (loss_sum, grads, total), (aux, measured) = jax.lax.scan(add, start, micro)
        total = jnp.where(total > 0, total, 1)
        grads = jax.tree.map(
            lambda g, p: (g / total.astype(g.dtype)).astype(p.dtype), grads, params
        )
        loss_mean = loss_sum / total.astype(loss_sum.dtype)
        value = (loss_mean, aux) if has_aux else loss_mean
        return (value, grads) if measured is None else (value, grads, MicroBatches(*measured))

    return whole if micro_batches == 1 else mean


def sampled_value_and_grad(
    loss: Callable[[Any, Any], Any],
    micro_batches: int,
    sampled: jax.Array,
    measure: Callable[[Any], Mapping[str, jax.Array]],
    tokens: Callable[[Any], Any],
) -> Callable[[Any, Any], tuple[Any, Any, MicroBatches]]:
    """`micro_batch_value_and_grad` with something else of the loss, measured at sampled steps only.

    A batch that is not cut is cut into two at those steps, and its gradient is the same but for
    rounding. There the something else must be without arrays.

    Args:
      loss: from parameters and a batch to its mean loss and something else.
      micro_batches: at least 1.
      sampled: boolean scalar.
      measure: as for `micro_batch_value_and_grad`.
      tokens: likewise.
    """
    grad_of: Any = micro_batch_value_and_grad

    def of_parts(params: Any, batch: Any) -> tuple[Any, Any, MicroBatches]:
        def if_sampled(grads: Any) -> Mapping[str, jax.Array]:
            zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            shapes = jax.eval_shape(measure, grads)
            return jax.lax.cond(sampled, lambda: measure(grads), zeros)

        split = grad_of(loss, micro_batches, tokens, has_aux=True, measure=if_sampled)
        value, grads, micro = split(params, batch)
        return value, grads, micro._replace(weights=jnp.where(sampled, micro.weights, 0))

    def of_whole(params: Any, batch: Any) -> tuple[Any, Any, MicroBatches]:
        halves = grad_of(loss, 2, tokens, has_aux=True, measure=measure)
        shapes = jax.eval_shape(halves, params, batch)[2]

        def whole() -> tuple[Any, Any, MicroBatches]:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return *grad_of(loss, 1, has_aux=True)(params, batch), nothing

        return jax.lax.cond(sampled, lambda: halves(params, batch), whole)

    return of_parts if micro_batches > 1 else of_whole
