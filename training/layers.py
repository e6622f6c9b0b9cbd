"""Parts of a layer that do not depend on the model: rotary positions and the normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from ..stability import rms_normalize


def rotate(x_BxTxHxK: jax.Array, base: float, share: float = 1.0) -> jax.Array:
    r"""Rotary position embedding: turns coordinate pairs by angles :math:`t\,b^{-2k/K}`.

    With a `share` below one only the first pairs turn, K being twice their number.

    Source: Su et al., 2021, https://arxiv.org/abs/2104.09864 (half-split pairs, as in GPT-NeoX).
    """
    _, length, _, width = x_BxTxHxK.shape
    turning = 2 * round(share * (width // 2))
    frequency = base ** (-jnp.arange(0, turning, 2, dtype=jnp.float32) / turning)
    frequency = jnp.pad(frequency, (0, (width - turning) // 2))
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, and a learned scale if it has one.

    ``nnx.RMSNorm`` (Flax 0.12) multiplies dtypes that strict promotion keeps apart.
    """

    def __init__(self, width: int, *, gain: bool = True):
        self.scale = nnx.Param(jnp.ones(width)) if gain else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype; the arithmetic is float32."""
        return rms_normalize(x, None if self.scale is None else self.scale[...])
