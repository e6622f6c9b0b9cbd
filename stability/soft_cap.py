"""Soft-capping: logits squeezed smoothly into an interval."""

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ._checks import check_cap


@checked
def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    r""":math:`c \tanh(z / c)`, the identity near zero and never beyond :math:`\pm c`.

    Args:
      logits: any shape.
      cap: :math:`c > 0`; ``None`` leaves the logits alone. Gemma 2 takes 30 for final logits and 50
        for attention logits.

    Raises:
      ValueError: if the cap is not positive and finite.

    Source: Gemma 2, 2024, https://arxiv.org/abs/2408.00118.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> ravine.stability.soft_cap(jnp.array([0.0, 1e4]), 30.0)
      Array([ 0., 30.], dtype=float32)
    """
    check_cap(cap)
    if cap is None:
        return logits
    return (cap * jnp.tanh(logits / cap)).astype(logits.dtype)
