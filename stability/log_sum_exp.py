"""The normaliser of a softmax, safe for any finite logits and under any mask."""

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide


@checked
def log_sum_exp(
    logits: jax.Array, where: jax.Array | None = None, *, axis: int = -1, keepdims: bool = False
) -> jax.Array:
    r""":math:`\log \sum_v e^{z_v}` over the entries that count, in at least float32.

    The largest entry is subtracted first, so no finite logits overflow. What `where` leaves out may hold
    anything, NaN among it; a row in which nothing counts gives :math:`-\infty` with gradient zero.

    Args:
      logits: floating point, any shape.
      where: boolean, broadcasts to `logits`: which entries count; ``None`` for all.
      axis: of the sum.
      keepdims: keep that axis with size 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import log_sum_exp
      >>> log_sum_exp(jnp.array([[1e4, 1e4], [0.0, -jnp.inf], [-jnp.inf, -jnp.inf]]))
      Array([10000.693,     0.   ,      -inf], dtype=float32)
    """
    logits = wide(logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=axis, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    total = jnp.sum(jnp.exp(logits - shift), axis=axis, keepdims=True)
    # The logarithm of zero has no gradient that could be multiplied with zero.
    found = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + shift)
    return found if keepdims else jnp.squeeze(found, axis)
