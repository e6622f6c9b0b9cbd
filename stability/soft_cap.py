"""Soft-capping: logits squeezed smoothly into an interval."""

from typing import Literal

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ._checks import check_cap

CapForm = Literal["tanh", "root"]


@checked
def soft_cap(logits: jax.Array, cap: float | None, form: CapForm = "tanh") -> jax.Array:
    r""":math:`c \tanh(z / c)`, the identity near zero and never beyond :math:`\pm c`.

    The other form, :math:`z / \sqrt{1 + (z / c)^2}`, comes near its bound more slowly: its derivative
    is :math:`(1 - (y / c)^2)^{3/2}` at the value :math:`y`, not :math:`1 - (y / c)^2`.

    Args:
      logits: any shape.
      cap: :math:`c > 0`; ``None`` leaves the logits alone. Gemma 2 takes 30 for final logits and 50
        for attention logits.
      form: ``"tanh"`` or ``"root"``.

    Raises:
      ValueError: if the cap is not positive and finite.

    Source: Gemma 2, 2024, https://arxiv.org/abs/2408.00118; the root: KellerJordan/modded-nanogpt,
    ``train_gpt_simple.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> ravine.stability.soft_cap(jnp.array([0.0, 1e4]), 30.0)
      Array([ 0., 30.], dtype=float32)
    """
    check_cap(cap)
    if cap is None:
        return logits
    z = logits / cap
    if form == "tanh":
        bounded = jnp.tanh(z)
    else:
        # There the value is the bound already, and the square is still finite.
        most = 0.5 * float(jnp.finfo(z.dtype).max) ** 0.5
        z = jnp.clip(z, -most, most)
        bounded = z * jax.lax.rsqrt(1 + jnp.square(z))
    return (cap * bounded).astype(logits.dtype)
