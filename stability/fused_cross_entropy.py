r"""Cross-entropy straight from hidden states: the `[tokens, vocabulary]` logits are never held.

Tokens are worked on a chunk at a time. The derivative of a token's loss,

.. math:: \frac{\partial \ell}{\partial z_v} = (1 + 2 c\, n)\, p_v - (1 - \epsilon)\,[v = y]
    - \frac{\epsilon}{V}, \qquad \times \; 1 - (z_v / C)^2 \text{ under a cap } C,

needs only the chunk's own logits. So the gradients are computed together with the loss and scaled later:
three products in all, as many as with all logits held, where recomputing chunks in the backward pass
would take four.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide_dtype
from ..core.checks import check_decay_rates, check_non_negative, check_whole
from ._checks import check_labels, check_same_shape
from .cross_entropy import CrossEntropy
from .soft_cap import CapForm, soft_cap


class _Options(NamedTuple):
    """What is static when traced."""

    classes: int
    axis: str | None
    z_loss: float
    cap: float | None
    cap_form: CapForm
    smoothing: float
    precision: Any


@checked
def fused_cross_entropy(
    hidden: jax.Array,
    unembedding_DxV: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    z_loss: float = 0.0,
    cap: float | None = None,
    cap_form: CapForm = "tanh",
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    vocabulary: int | None = None,
    vocabulary_axis: str | None = None,
    token_axes: str | Sequence[str] = (),
    precision: Any = None,
) -> tuple[jax.Array, CrossEntropy]:
    r"""Weighted mean of ``cross_entropy(hidden @ unembedding, labels)``, logits a chunk at a time.

    .. math:: \frac{1}{\sum_i w_i} \sum_i w_i \, (\ell_i + \ell_{z,i})

    The products are those of the dtype of `hidden`, into which the unembedding is cast, and are summed
    up in at least float32, as are the softmax and both gradients. The memory taken is that of two
    chunks of logits and of the unembedding's gradient. Only the mean is differentiable, in reverse
    mode and once; the parts are for inspection.

    **Vocabulary over a mesh axis.** Inside ``jax.shard_map``, with `vocabulary_axis` given, the
    unembedding is this device's block of columns, all blocks being equally wide (pad at the end, and
    give `vocabulary`); hidden states and labels are those of all columns. The loss exchanges two
    scalars per token; the gradient of the hidden states, of which every device has the part that its
    columns make, is summed up once. With `token_axes` the tokens are this device's too, and the
    mean is over all of them; the gradient of the unembedding is then summed up once.

    Args:
      hidden: ``[..., D]``, floating point.
      unembedding_DxV: [in, out], as a head's kernel; of a tied embedding give the transpose.
      labels: ``[...]``, integers in [0, V).
      weights: ``[...]``, boolean or not negative; ``None`` counts all. Tokens of weight zero may have
        any label and any hidden state, NaN among them.
      z_loss: c of the z-loss.
      cap: C of the soft-cap; ``None`` for none.
      cap_form: its form, see :func:`soft_cap`.
      label_smoothing: :math:`\epsilon` in [0, 1).
      chunk: tokens worked on at once, at least 1; by default so many that their logits take about a
        sixty-fourth of the memory of all of them, and at least 64.
      vocabulary: V, if the last columns of the unembedding are padding, which then count for nothing.
      vocabulary_axis: the mesh axis over which columns are spread.
      token_axes: mesh axes over which tokens are spread.
      precision: of the products, as for ``jax.lax.dot_general``.

    Returns:
      The mean, a scalar in at least float32, and the `CrossEntropy` of each token, without gradient and
      zero where nothing is weighted.
      As with :func:`cross_entropy`, a label out of range gives NaN under ``jit``.

    Raises:
      TypeError: for labels that are no integers.
      ValueError: if shapes do not match, a value is out of range, or, outside of ``jit``, the label
        of a token that counts is.

    Source: the memory is saved as in Liger Kernel (``fused_linear_cross_entropy``) and Wijmans et al.,
    2024, https://arxiv.org/abs/2411.09009.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import fused_cross_entropy
      >>> hidden, unembedding = jnp.ones((7, 4)), jnp.zeros((4, 257))
      >>> loss, parts = fused_cross_entropy(hidden, unembedding, jnp.zeros(7, int), z_loss=1e-4)
      >>> round(float(loss), 4), round(float(parts.loss[0]), 4)
      (5.5522, 5.5491)
    """
    check_non_negative(z_loss=z_loss)
    check_decay_rates(label_smoothing=label_smoothing)
    soft_cap(jnp.zeros([]), cap)
    shape, width = labels.shape, hidden.shape[-1]
    if hidden.shape[:-1] != shape:
        raise ValueError(
            "hidden must have the shape of the labels and one axis more, got "
            f"{hidden.shape} and {shape}."
        )
    check_same_shape(shape, weights=weights)
    if unembedding_DxV.ndim != 2 or unembedding_DxV.shape[0] != width:
        raise ValueError(
            f"unembedding must be [{width}, V] as hidden is [..., {width}], got "
            f"{unembedding_DxV.shape}; give the transpose of a tied embedding."
        )
    columns = unembedding_DxV.shape[1]
    shards = 1 if vocabulary_axis is None else jax.lax.axis_size(vocabulary_axis)
    classes = columns * shards if vocabulary is None else vocabulary
    if not 1 <= classes <= columns * shards:
        raise ValueError(
            f"vocabulary must lie in [1, {columns * shards}], the unembedding's columns, got {classes}."
        )
    tokens = labels.size
    if chunk is None:
        chunk = max(64, tokens // 64)
    check_whole(1, chunk=chunk)
    check_labels(labels, classes, weights)

    token_axes = (token_axes,) if isinstance(token_axes, str) else tuple(token_axes)
    dtype = wide_dtype(hidden.dtype)
    weights = jnp.ones(shape, dtype) if weights is None else jnp.asarray(weights).astype(dtype)
    counted = weights != 0
    flat = (
        jnp.where(counted[..., None], hidden, 0).reshape(tokens, width),
        jnp.where(counted, labels, 0).reshape(tokens),
        _varying(weights.reshape(tokens), token_axes),
    )
    hidden_axes = () if vocabulary_axis is None else (vocabulary_axis,)
    # What is the same on all devices is made theirs alone, so that its gradient is summed up, once.
    flat_hidden = _varying(flat[0], hidden_axes)
    unembedding_DxV = _varying(unembedding_DxV.astype(hidden.dtype), token_axes)
    options = _Options(
        classes, vocabulary_axis, float(z_loss), cap, cap_form, float(label_smoothing), precision
    )
    chunks = max(-(-tokens // chunk), 1)
    chunked = [_dealt(x, chunks) for x in (flat_hidden, *flat[1:])]
    total, parts = cast(Any, _sums(options, chunked[0], unembedding_DxV, *chunked[1:]))
    weight = jnp.sum(flat[2])
    if token_axes:
        total, weight = jax.lax.psum((total, weight), token_axes)
    seen = jax.tree.map(
        lambda part: jnp.where(counted, _gathered(part, tokens).reshape(shape), 0), parts
    )
    return total / jnp.where(weight > 0, weight, 1), seen


def _varying(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    varying = jax.typeof(x).manual_axis_type.varying
    missing = tuple(axis for axis in axes if axis not in varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _dealt(x: jax.Array, chunks: int) -> jax.Array:
    """`[tokens, ...]` as `[chunks, tokens a chunk, ...]`, zeros at the end.

    Tokens are dealt out in turn, so that what is sharded over tokens stays where it is.
    """
    padding = -x.shape[0] % chunks
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0)


def _gathered(x: jax.Array, tokens: int) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(-1)[:tokens]


def _parts(
    options: _Options, hidden: jax.Array, unembedding: jax.Array, labels: jax.Array
) -> tuple[CrossEntropy, Any]:
    """The losses of one chunk, and what its gradient is made of."""
    dtype = wide_dtype(hidden.dtype)
    raw = jax.lax.dot_general(
        hidden,
        unembedding,
        (((1,), (0,)), ((), ())),
        precision=options.precision,
        preferred_element_type=dtype,
    )
    z = soft_cap(raw, options.cap, options.cap_form)
    column = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    if options.axis is not None:
        column += jax.lax.axis_index(options.axis) * unembedding.shape[1]
    padded = options.classes < unembedding.shape[1] or options.axis is not None
    counts = column < options.classes if padded else None
    if counts is not None:
        z = jnp.where(counts, z, -jnp.inf)
    highest = jnp.max(z, axis=1)
    if options.axis is not None:
        highest = jax.lax.pmax(highest, options.axis)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    labelled = column == labels[:, None].astype(jnp.int32)
    exponentials = jnp.exp(z - highest[:, None])
    sums = [
        jnp.sum(exponentials, axis=1),
        jnp.sum(jnp.where(labelled, z, 0), axis=1),
        jnp.sum(z if counts is None else jnp.where(counts, z, 0), axis=1)
        if options.smoothing
        else jnp.zeros_like(highest),
    ]
    if options.axis is not None:
        sums = jax.lax.psum(sums, options.axis)
    total, picked, whole = sums
    normalizer = jnp.log(total) + highest
    loss = normalizer - picked
    if options.smoothing:
        loss += options.smoothing * (picked - whole / options.classes)
    loss = jnp.where((labels >= 0) & (labels < options.classes), loss, jnp.nan)
    found = CrossEntropy(loss, options.z_loss * jnp.square(normalizer), normalizer)
    return found, (raw, counts, labelled, normalizer)


def _logit_gradient(
    options: _Options, weights: jax.Array, raw: Any, counts: Any, labelled: Any, normalizer: Any
) -> jax.Array:
    z = soft_cap(raw, options.cap, options.cap_form)
    share = jnp.exp(z - normalizer[:, None])
    share *= 1 + 2 * options.z_loss * normalizer[:, None]
    smoothing = options.smoothing
    found = share - jnp.where(labelled, 1 - smoothing, 0)
    if smoothing:
        found -= smoothing / options.classes
    if options.cap is not None:
        slope = 1 - jnp.square(z / options.cap)
        found *= slope if options.cap_form == "tanh" else slope * jnp.sqrt(slope)
    if counts is not None:
        found = jnp.where(counts, found, 0)
    return found * weights[:, None]


def _weighted(weights: jax.Array, parts: CrossEntropy) -> jax.Array:
    return jnp.sum(jnp.where(weights == 0, 0, weights * (parts.loss + parts.z_loss)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    options: _Options, hidden: jax.Array, unembedding: jax.Array, labels: Any, weights: Any
) -> tuple[jax.Array, CrossEntropy]:
    """The weighted sum over all chunks, and the parts of each token."""

    def one(total: jax.Array, chunk: Any) -> tuple[jax.Array, CrossEntropy]:
        hidden, labels, weights = chunk
        parts, _ = _parts(options, hidden, unembedding, labels)
        return total + _weighted(weights, parts), parts

    start = _start(weights)
    return jax.lax.scan(one, start, (hidden, labels, weights))


def _start(weights: jax.Array) -> jax.Array:
    # From the weights, so that it varies over the mesh as they do.
    return jnp.sum(jnp.zeros_like(weights))


def _sums_forward(
    options: _Options, hidden: jax.Array, unembedding: jax.Array, labels: Any, weights: Any
) -> Any:
    dtype = wide_dtype(hidden.dtype)

    def one(carry: Any, chunk: Any) -> Any:
        total, unembedding_gradient = carry
        hidden, labels, weights = chunk
        parts, kept = _parts(options, hidden, unembedding, labels)
        # In the dtype of the products: mixed, they would be done in float32.
        logit_gradient = _logit_gradient(options, weights, *kept).astype(hidden.dtype)
        product = functools.partial(
            jax.lax.dot_general, precision=options.precision, preferred_element_type=dtype
        )
        hidden_gradient = product(logit_gradient, unembedding, (((1,), (1,)), ((), ())))
        unembedding_gradient += product(hidden, logit_gradient, (((0,), (0,)), ((), ())))
        total += _weighted(weights, parts)
        return (total, unembedding_gradient), (parts, hidden_gradient.astype(hidden.dtype))

    zeros = jnp.zeros_like(unembedding, dtype=dtype) + 0 * jnp.sum(hidden[0, 0, 0]).astype(dtype)
    carry, (parts, hidden_gradient) = jax.lax.scan(
        one, (_start(weights), zeros), (hidden, labels, weights)
    )
    total, unembedding_gradient = carry
    dtypes = jnp.zeros([], unembedding.dtype)
    return (total, parts), (hidden_gradient, unembedding_gradient, dtypes)


def _sums_backward(options: _Options, kept: Any, cotangents: Any) -> Any:
    del options
    hidden_gradient, unembedding_gradient, dtypes = kept
    scale = cotangents[0]  # the parts have no gradient

    def scaled(x: jax.Array, dtype: Any) -> jax.Array:
        return (x * scale.astype(x.dtype)).astype(dtype)

    return (
        scaled(hidden_gradient.astype(scale.dtype), hidden_gradient.dtype),
        scaled(unembedding_gradient, dtypes.dtype),
        None,
        None,
    )


_sums.defvjp(_sums_forward, _sums_backward)
