"""ZClip: the global norm, clipped by its number of deviations above its running mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import check_decay_rates, check_positive, check_whole
from ..core.transformation import transformation
from ._arithmetic import global_norm, scale


class ZClipState(NamedTuple):
    """State of `zclip`."""

    count: jax.Array  # int32 scalar, finite gradients seen so far
    mean: jax.Array  # float32 scalar, of their norms
    variance: jax.Array  # float32 scalar, of their norms


@checked
def zclip(
    z_threshold: float = 2.5,
    decay: float = 0.97,
    *,
    max_norm: float | None = 1.0,
    warmup: int = 25,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    r"""Clips gradients of unusual norm, and more unusual ones harder.

    With :math:`z = (\lVert g \rVert - \mu) / (\sigma + \epsilon)` and the threshold :math:`z_0`:

    .. math::
        c &= \mu + \sigma z_0^2 / z \text{ if } z > z_0, \text{ else } \lVert g \rVert \\
        \hat g &= g \min(1, \min(c, c_{\max}) / \lVert g \rVert) \\
        \mu &\leftarrow \alpha \mu + (1 - \alpha) c, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)(c - \mu)^2

    so the statistics see the clipped norm, and the new mean goes into the new variance. In warm-up only
    :math:`c_{\max}` clips, and mean and variance are those of the norms so far. A gradient that is not
    finite passes, and the statistics skip it.

    Args:
      z_threshold: :math:`z_0`.
      decay: :math:`\alpha`.
      max_norm: :math:`c_{\max}`; ``None`` for none.
      warmup: steps of warm-up, at least 1.
      eps: added to the deviation, and to the norm that is divided by.

    Raises:
      ValueError: for values out of range.

    Source: Kumar et al., 2025, https://arxiv.org/abs/2504.02507; bluorion-com/ZClip, ``zclip.py``
    (mode zscore, option adaptive_scaling).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.zclip(warmup=2, max_norm=None)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.5, 9.0):
      ...     clipped, state = tx.update(jnp.array([gradient]), state)
      ...     print(clipped.round(4))
      [1.]
      [1.5]
      [1.3004]
    """
    check_positive(z_threshold=z_threshold, max_norm=max_norm, eps=eps)
    check_decay_rates(decay=decay)
    check_whole(1, warmup=warmup)

    def init(params: optax.Params) -> ZClipState:
        del params
        mean, variance = (jnp.zeros([], jnp.float32) for _ in range(2))
        return ZClipState(jnp.zeros([], jnp.int32), mean, variance)

    def update(
        updates: optax.Updates, state: ZClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ZClipState]:
        del params
        norm = global_norm(updates)
        finite, warm = jnp.isfinite(norm), state.count < warmup
        deviation = jnp.sqrt(state.variance)
        z = (norm - state.mean) / (deviation + eps)
        unusual = ~warm & (z > z_threshold)
        limit = jnp.where(unusual, state.mean + z_threshold * deviation * (z_threshold / z), norm)

        lowest = limit if max_norm is None else jnp.minimum(limit, max_norm)
        factor = jnp.where(finite & (norm > lowest), lowest / (norm + eps), 1)

        def moved(old: jax.Array, new: jax.Array) -> jax.Array:
            number = (state.count + 1).astype(jnp.float32)
            keep = jnp.where(warm, 1 - 1 / number, decay)
            return keep * old + (1 - keep) * new

        mean = moved(state.mean, limit)
        # In warm-up Welford's recurrence, which gives the variance of all norms so far.
        behind = jnp.where(warm, limit - state.mean, limit - mean)
        new = ZClipState(state.count + 1, mean, moved(state.variance, behind * (limit - mean)))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return jax.tree.map(lambda g: scale(g, factor), updates), kept

    return transformation(init, update)
