"""Arithmetic in at least float32, with selects instead of products with masks."""

from typing import Any

import jax
import jax.numpy as jnp

from ..core.arithmetic import wide, wide_dtype
from ..core.mapped import cond


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`factor * x` in at least float32, back in the dtype of `x`; exactly `x` where the factor is 1.

    Infinity stays infinite, where a plain product with a factor of 0 would give NaN.
    """
    factor = factor.astype(wide_dtype(x.dtype))
    factor = factor.reshape((1,) * (x.ndim - factor.ndim) + factor.shape)
    return jnp.where(jnp.isfinite(x), wide(x) * factor, wide(x)).astype(x.dtype)


def global_norm(tree: Any) -> jax.Array:
    """The float32 norm of a whole tree, also of bfloat16 and float16 leaves; infinite only if a leaf is.

    Where the squares overflow, leaves are divided by the largest magnitude first.
    """
    leaves = [wide(x) for x in jax.tree.leaves(tree) if x.size]
    if not leaves:
        return jnp.zeros([], jnp.float32)

    def norm(by: jax.Array) -> jax.Array:
        squares = [jnp.sum(jnp.square(x / by.astype(x.dtype))) for x in leaves]
        return jnp.sqrt(sum(square.astype(jnp.float32) for square in squares))

    def divided() -> jax.Array:
        highest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in leaves]))
        return jnp.where(jnp.isfinite(highest), highest * norm(highest), highest)

    plain = norm(jnp.ones([], jnp.float32))
    return cond(jnp.isfinite(plain), lambda: plain, divided)
