"""Losses of language models."""

import jax
import jax.numpy as jnp


def _negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def next_token_loss(
    logits_BxTxV: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array | None = None
) -> jax.Array:
    r"""Mean negative log-likelihood of the next tokens, over the whole batch.

    .. math:: \frac{1}{\sum_{b,t} w_{b,t}} \sum_{b,t} w_{b,t}
        \left(\log \sum_v e^{z_{b,t,v}} - z_{b,t,y_{b,t}}\right)

    Logits are taken to float32 first. Where nothing is weighted, the loss and its gradient are
    zero; a position of weight zero may hold any logits, NaN among them.

    Args:
      logits_BxTxV: floating point, computed from the tokens up to t.
      targets_BxT: the tokens at t + 1, integers in [0, V).
      weights_BxT: weights :math:`w` of the targets, boolean or not negative; ``None`` counts all.

    Returns:
      A float32 scalar, in nats per token.

    Raises:
      ValueError: if the shapes do not match.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> loss = ravine.stability.next_token_loss(jnp.zeros((1, 3, 256)), jnp.zeros((1, 3), int))
      >>> round(float(loss), 4)  # log 256
      5.5452
    """
    if logits_BxTxV.shape[:-1] != targets_BxT.shape:
        raise ValueError(
            "logits must have the shape of the targets and one axis more, got "
            f"{logits_BxTxV.shape} and {targets_BxT.shape}."
        )
    if weights_BxT is not None and weights_BxT.shape != targets_BxT.shape:
        raise ValueError(
            "weights must have the shape of the targets, got "
            f"{weights_BxT.shape} and {targets_BxT.shape}."
        )
    logits = logits_BxTxV.astype(jnp.float32)
    if weights_BxT is None:
        return jnp.mean(_negative_log_likelihood(logits, targets_BxT))
    weights = weights_BxT.astype(jnp.float32)
    # Selecting before the logarithm keeps NaN of uncounted positions out of the gradient too.
    logits = jnp.where((weights > 0)[..., None], logits, 0.0)
    total = jnp.sum(weights)
    weighted = jnp.sum(weights * _negative_log_likelihood(logits, targets_BxT))
    return weighted / jnp.where(total > 0, total, 1.0)
