"""Attention that reports how large its logits grow, for MHA, GQA, MQA and MLA.

Axes, as suffixes: B batch, T queries' time, S keys' time, H query heads, G key heads (H is a multiple
of G), K width of a head, R width of its rotary part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide, wide_dtype
from ..core.checks import check_positive
from .soft_cap import soft_cap


@checked
def rms_normalize(
    x: jax.Array, gain: jax.Array | None = None, *, axes: tuple[int, ...] = (-1,), eps: float = 1e-6
) -> jax.Array:
    r""":math:`\gamma\, x / \sqrt{\operatorname{mean} x^2 + \epsilon}`, computed in at least float32.

    Args:
      x: any shape.
      gain: :math:`\gamma`, of the shape of the last axes of `x`; ``None`` for one.
      axes: of the mean.
      eps: :math:`\epsilon`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import rms_normalize
      >>> rms_normalize(jnp.array([3.0, 3.0])).round(3)
      Array([1., 1.], dtype=float32)
    """
    check_positive(eps=eps)
    square = jnp.mean(jnp.square(wide(x)), axis=axes, keepdims=True)
    found = wide(x) * jax.lax.rsqrt(square + eps)
    if gain is not None:
        if gain.shape != x.shape[x.ndim - gain.ndim :]:
            raise ValueError(
                f"gain must have the shape of the last axes of {x.shape}, got {gain.shape}."
            )
        found *= gain.astype(found.dtype).reshape((1,) * (x.ndim - gain.ndim) + gain.shape)
    return found.astype(x.dtype)


@checked
def qk_norm(
    queries_BxTxHxK: jax.Array,
    keys_BxSxGxK: jax.Array,
    query_gain: jax.Array | None = None,
    key_gain: jax.Array | None = None,
    *,
    full_width: bool = False,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys divided by their root mean square: logits do not depend on the weights' size.

    With gains of one a logit times the root of K is then at most K: it cannot grow with the weights.

    Args:
      queries_BxTxHxK: before the rotary embedding (Gemma 3, Qwen 3, OLMo 2) or after.
      keys_BxSxGxK: likewise.
      query_gain: `[K]`, or `[H, K]`; ``None`` for one.
      key_gain: `[K]`, or `[G, K]`; ``None`` for one.
      full_width: one mean over all heads together (OLMo 2) instead of one per head.
      eps: added to the mean square.

    Raises:
      ValueError: for gains of another shape.

    Source: Dehghani et al., 2023, https://arxiv.org/abs/2302.05442; OLMo 2, 2024,
    https://arxiv.org/abs/2501.00656 (full width).

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import qk_norm
      >>> q, k = qk_norm(100.0 * jnp.ones((1, 2, 4, 8)), jnp.ones((1, 2, 2, 8)))
      >>> float(jnp.max(q).round(4)), float(jnp.max(k).round(4))
      (1.0, 1.0)
    """
    axes = (-2, -1) if full_width else (-1,)
    queries = rms_normalize(queries_BxTxHxK, query_gain, axes=axes, eps=eps)
    return queries, rms_normalize(keys_BxSxGxK, key_gain, axes=axes, eps=eps)


@checked
def attention_logits(
    queries_BxTxHxK: jax.Array,
    keys_BxSxGxK: jax.Array,
    rotary_queries_BxTxHxR: jax.Array | None = None,
    rotary_keys_BxSxR: jax.Array | None = None,
    *,
    scale: float | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""Scaled products of queries and keys, `[B, H, T, S]`, in at least float32.

    Query head h looks at key head :math:`\lfloor h G / H \rfloor`: G = H is multi-head attention, G = 1
    multi-query. The rotary parts of MLA, whose key all heads share, are added.

    Args:
      queries_BxTxHxK: queries.
      keys_BxSxGxK: keys, G dividing H.
      rotary_queries_BxTxHxR: of MLA.
      rotary_keys_BxSxR: of MLA, one for all heads.
      scale: by default the root of K, or K + R, divides.
      precision: of the products.

    Raises:
      ValueError: if shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import attention_logits
      >>> attention_logits(jnp.ones((1, 2, 4, 9)), jnp.ones((1, 2, 2, 9))).shape
      (1, 4, 2, 2)
    """
    batch, length, heads, width = queries_BxTxHxK.shape
    groups = keys_BxSxGxK.shape[2]
    if keys_BxSxGxK.shape[0] != batch or keys_BxSxGxK.shape[3] != width or heads % groups:
        raise ValueError(
            "keys must be [B, S, G, K] for queries [B, T, H, K] with G dividing H, got "
            f"{keys_BxSxGxK.shape} and {queries_BxTxHxK.shape}."
        )
    if (rotary_queries_BxTxHxR is None) != (rotary_keys_BxSxR is None):
        raise ValueError("give both rotary queries and rotary keys, or neither.")
    dtype = wide_dtype(queries_BxTxHxK.dtype)
    grouped = queries_BxTxHxK.reshape(batch, length, groups, heads // groups, width)
    logits = jnp.einsum(
        "btgrk,bsgk->bgrts",
        grouped,
        keys_BxSxGxK,
        precision=precision,
        preferred_element_type=dtype,
    ).reshape(batch, heads, length, -1)
    if rotary_queries_BxTxHxR is not None and rotary_keys_BxSxR is not None:
        width += rotary_queries_BxTxHxR.shape[-1]
        logits += jnp.einsum(
            "bthr,bsr->bhts",
            rotary_queries_BxTxHxR,
            rotary_keys_BxSxR,
            precision=precision,
            preferred_element_type=dtype,
        )
    return logits * (width**-0.5 if scale is None else scale)


@checked
def safe_softmax(logits: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Softmax over the last axis, of the entries that count; a row in which none does is zero.

    Args:
      logits: floating point; taken to at least float32. Entries left out may hold anything.
      where: boolean, broadcasts to `logits`; ``None`` for all.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import safe_softmax
      >>> safe_softmax(jnp.array([1e4, 1e4, jnp.nan]), jnp.array([True, True, False]))
      Array([0.5, 0.5, 0. ], dtype=float32)
    """
    logits = wide(logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shares = jnp.exp(logits - jnp.where(jnp.isneginf(highest), 0, highest))
    total = jnp.sum(shares, axis=-1, keepdims=True)
    return shares / jnp.where(total == 0, 1, total)


@checked
def max_logits(logits_BxHxTxS: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """The largest logit of each head that counts, `[H]` float32 without gradient; -inf if none does.

    Args:
      logits_BxHxTxS: before the soft-cap.
      where: boolean, broadcasts to the logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import max_logits
      >>> max_logits(jnp.arange(8.0).reshape(1, 2, 2, 2))
      Array([3., 7.], dtype=float32)
    """
    logits = jax.lax.stop_gradient(logits_BxHxTxS)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    return jnp.max(logits, axis=(0, 2, 3)).astype(jnp.float32)


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    mixed: jax.Array
    """`[B, T, H, K]`, in the dtype of the values."""
    max_logits: jax.Array
    """`[H]`, float32: what :func:`qk_clip` takes, before the soft-cap."""


@checked
def attention(
    queries_BxTxHxK: jax.Array,
    keys_BxSxGxK: jax.Array,
    values_BxSxGxK: jax.Array,
    rotary_queries_BxTxHxR: jax.Array | None = None,
    rotary_keys_BxSxR: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    causal: bool = False,
    cap: float | None = None,
    scale: float | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> AttentionOutput:
    """Attention with safe softmax, soft-cap, and the largest logit of every head.

    Args:
      queries_BxTxHxK: queries.
      keys_BxSxGxK: keys, G dividing H.
      values_BxSxGxK: values, of any width.
      rotary_queries_BxTxHxR: of MLA, see :func:`attention_logits`.
      rotary_keys_BxSxR: of MLA.
      where: boolean, broadcasts to `[B, H, T, S]`: which keys a query sees. One that sees none gets
        zeros.
      causal: queries see keys of their own and of earlier times only.
      cap: of the soft-cap of the logits; ``None`` for none.
      scale: of the logits; by default the root of the width divides.
      precision: of the products.

    Raises:
      ValueError: if shapes do not match, or for a cap that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import attention
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> found = attention(x, x, x, causal=True)
      >>> found.mixed.shape, found.max_logits
      ((1, 3, 2, 4), Array([2., 2.], dtype=float32))
    """
    logits = attention_logits(
        queries_BxTxHxK,
        keys_BxSxGxK,
        rotary_queries_BxTxHxR,
        rotary_keys_BxSxR,
        scale=scale,
        precision=precision,
    )
    batch, heads, length, keys = logits.shape
    groups = values_BxSxGxK.shape[2]
    if values_BxSxGxK.shape[:2] != (batch, keys) or heads % groups:
        raise ValueError(
            f"values must be [{batch}, {keys}, G, K] with G dividing {heads}, got "
            f"{values_BxSxGxK.shape}."
        )
    if causal:
        earlier = jnp.tril(jnp.ones((length, keys), bool), keys - length)[None, None]
        where = earlier if where is None else where & earlier
    highest = max_logits(logits, where)
    weights = safe_softmax(soft_cap(logits, cap), where).astype(values_BxSxGxK.dtype)
    grouped = weights.reshape(batch, groups, heads // groups, length, keys)
    mixed = jnp.einsum("bgrts,bsgk->btgrk", grouped, values_BxSxGxK, precision=precision)
    return AttentionOutput(mixed.reshape(batch, length, heads, -1), highest)
