"""Statistics of logits: how certain the model is, and how large they have grown."""

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide
from .log_sum_exp import log_sum_exp


@checked
def logit_statistics(
    logits: jax.Array, where: jax.Array | None = None, sampled: jax.Array | bool = True
) -> dict[str, jax.Array]:
    """Means over tokens of entropy and log-normaliser, and the largest logit: float32, no gradient.

    Args:
      logits: ``[..., V]``.
      where: ``[...]``, boolean: which tokens count; ``None`` for all.
      sampled: a scalar; if false nothing is computed, and all values are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import logit_statistics
      >>> {k: round(float(v), 3) for k, v in logit_statistics(jnp.zeros((2, 256))).items()}
      {'entropy': 5.545, 'log_normalizer': 5.545, 'max_logit': 0.0}
    """
    logits = jax.lax.stop_gradient(logits)

    def measure() -> dict[str, jax.Array]:
        z = wide(logits)
        counted = jnp.ones(z.shape[:-1], bool) if where is None else where
        z = jnp.where(counted[..., None], z, 0)
        number = jnp.maximum(jnp.sum(counted), 1).astype(z.dtype)
        normalizer = log_sum_exp(z)
        shares = jnp.exp(z - normalizer[..., None])
        entropy = normalizer - jnp.sum(jnp.where(shares > 0, shares * z, 0), axis=-1)
        mean = lambda x: jnp.sum(jnp.where(counted, x, 0)) / number
        highest = jnp.max(jnp.where(counted, jnp.max(z, axis=-1), -jnp.inf))
        found = {"entropy": mean(entropy), "log_normalizer": mean(normalizer), "max_logit": highest}
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    names = ("entropy", "log_normalizer", "max_logit")
    nothing = dict.fromkeys(names, jnp.zeros([], jnp.float32))
    return measure() if sampled is True else jax.lax.cond(sampled, measure, lambda: nothing)
