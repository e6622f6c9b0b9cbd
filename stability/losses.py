"""From the losses of single tokens to the number that training minimises."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide
from ._checks import check_labels, check_same_shape
from .cross_entropy import cross_entropy


@checked
def token_mean(
    values: jax.Array,
    weights: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array:
    r""":math:`\sum w x / \sum w` over all tokens: a mean of means only if all are of as many tokens.

    Tokens of weight zero may hold anything; where nothing is weighted the mean is zero.

    Args:
      values: floating point, any shape.
      weights: the same shape, boolean or not negative; ``None`` counts all.
      axis_name: mesh axes over which tokens are spread inside ``jax.shard_map``, which are then
        summed over as well; under ``jax.jit`` alone the mean is over the global batch anyway.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import token_mean
      >>> float(token_mean(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([3.0, 1.0, 0.0])))
      1.75
    """
    values = wide(values)
    weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
    total = jnp.sum(jnp.where(weights == 0, 0, weights * values))
    weight = jnp.sum(weights)
    if axis_name is not None:
        total, weight = jax.lax.psum((total, weight), axis_name)
    return total / jnp.where(weight > 0, weight, 1)


@checked
def document_weights(documents_BxT1: jax.Array) -> jax.Array:
    """Which next tokens belong to the document of the token before: weights of the targets, `[B, T]`.

    Args:
      documents_BxT1: the document of each of T + 1 tokens, integers; negative ones mark padding.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import document_weights
      >>> document_weights(jnp.array([[0, 0, 1, 1, -1, -1]])).astype(int)
      Array([[1, 0, 1, 0, 0]], dtype=int32)
    """
    before, after = documents_BxT1[:, :-1], documents_BxT1[:, 1:]
    return (before == after) & (after >= 0)


@checked
def next_token_loss(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array | None = None,
    *,
    documents_BxT1: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array:
    r"""Mean negative log-likelihood of the next tokens, over the whole batch.

    .. math:: \frac{1}{\sum_{b,t} w_{b,t}} \sum_{b,t} w_{b,t}
        \left(\log \sum_v e^{z_{b,t,v}} - z_{b,t,y_{b,t}}\right)

    Logits are taken to float32 first. Where nothing is weighted, the loss and its gradient are
    zero; a position of weight zero may hold any logits and any label, NaN among them.

    Args:
      logits_BxTxV: floating point, computed from the tokens up to t.
      targets_BxT: the tokens at t + 1, integers in [0, V); see :func:`cross_entropy` for others.
      weights_BxT: weights :math:`w` of the targets, boolean or not negative; ``None`` counts all.
      documents_BxT1: the document of each token and of the last target; targets in another
        document than the token before them are not counted, see :func:`document_weights`.
      axis_name: mesh axes over which tokens are spread inside ``jax.shard_map``.

    Returns:
      A float32 scalar, in nats per token.

    Raises:
      TypeError: for targets that are no integers.
      ValueError: if the shapes do not match, or, outside of ``jit``, a target that counts is out of
        range.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> loss = ravine.stability.next_token_loss(jnp.zeros((1, 3, 256)), jnp.zeros((1, 3), int))
      >>> round(float(loss), 4)  # log 256
      5.5452
    """
    shape = targets_BxT.shape
    if logits_BxTxV.shape[:-1] != shape:
        raise ValueError(
            "logits must have the shape of the targets and one axis more, got "
            f"{logits_BxTxV.shape} and {shape}."
        )
    check_same_shape(shape, weights=weights_BxT)
    if weights_BxT is not None:
        weights_BxT = jnp.asarray(weights_BxT).astype(jnp.float32)
    if documents_BxT1 is not None:
        expected = (*shape[:-1], shape[-1] + 1)
        if documents_BxT1.shape != expected:
            raise ValueError(
                "documents must have one column more than the targets, "
                f"got {documents_BxT1.shape}, not {expected}."
            )
        inside = document_weights(documents_BxT1).astype(jnp.float32)
        weights_BxT = inside if weights_BxT is None else inside * weights_BxT
    check_labels(targets_BxT, logits_BxTxV.shape[-1], weights_BxT)
    if weights_BxT is None:
        return token_mean(cross_entropy(logits_BxTxV, targets_BxT).loss, axis_name=axis_name)
    # Selecting before the logarithm keeps NaN of uncounted positions out of the gradient too.
    counted = weights_BxT != 0
    found = cross_entropy(
        jnp.where(counted[..., None], logits_BxTxV, 0), jnp.where(counted, targets_BxT, 0)
    )
    return token_mean(found.loss, weights_BxT, axis_name)
