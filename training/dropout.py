"""Dropout without state: what drops out is a function of the count of updates and of the tokens."""

import jax
import jax.numpy as jnp
from flax import nnx


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with a random share of its elements zero, and the others larger by as much; `x` without a key.

    Source: Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.dropout import dropped
      >>> sorted(set(dropped(jnp.ones(100), 0.5, jax.random.key(0)).tolist()))
      [0.0, 2.0]
    """
    return x if key is None or not rate else nnx.Dropout(rate)(x, rngs=key)


def dropout_key(count: jax.Array, batch: jax.Array) -> jax.Array:
    """The key of what drops out: another one at each update and, by its tokens, for each micro-batch.

    So it needs no state, and a resumed run drops what the uninterrupted one would have dropped.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.dropout import dropout_key
      >>> one, other = (dropout_key(jnp.int32(count), jnp.ones((2, 3), int)) for count in (0, 1))
      >>> bool((jax.random.key_data(one) == jax.random.key_data(other)).all())
      False
    """
    key = jax.random.fold_in(jax.random.key(0), count)
    places = jnp.arange(1, batch.size + 1, dtype=jnp.uint32).reshape(batch.shape)
    return jax.random.fold_in(key, jnp.sum(places * batch.astype(jnp.uint32)))
