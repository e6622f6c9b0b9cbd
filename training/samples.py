"""A few continuations of held-out text, drawn from a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .data.corpus import Corpus


@functools.partial(jax.jit, static_argnums=(0, 3))
def continued(
    graphdef: nnx.GraphDef, params: Any, tokens_BxT: jax.Array, start: int, seed: jax.Array
) -> jax.Array:
    """Tokens, from position `start` on drawn from the model; [B, T], T at most its context."""
    key = jax.random.key(seed)

    def draw(at: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        logits_BxV = model(tokens_BxT)[:, at - 1]  # causal: what comes after does not matter
        drawn = jax.random.categorical(jax.random.fold_in(key, at), logits_BxV)
        return tokens_BxT.at[:, at].set(drawn.astype(tokens_BxT.dtype))

    return jax.lax.fori_loop(start, tokens_BxT.shape[1], draw, tokens_BxT)


def samples(
    graphdef: nnx.GraphDef, params: Any, heldout_BxT: Any, count: int, corpus: Corpus, seed: int
) -> list[str]:
    """Texts, each a quarter held-out prompt; numbers of tokens where their text is not known.

    Args:
      graphdef: static half of the model.
      params: its parameters.
      heldout_BxT: held-out tokens, as many rows as the mesh takes.
      count: how many of the rows to return.
      corpus: says what tokens mean.
      seed: of the draws.
    """
    start = max(1, heldout_BxT.shape[1] // 4)
    drawn = continued(graphdef, params, heldout_BxT, start, jnp.uint32(seed))
    return [text_of(row, corpus) for row in np.asarray(drawn)[:count]]


def text_of(tokens: np.ndarray, corpus: Corpus) -> str:
    """Tokens as one line of text."""
    if corpus.decode is not None:
        return repr(corpus.decode(tokens))
    if corpus.bytes_per_token == 1.0 and corpus.vocabulary == 256:
        return repr(bytes(tokens.astype(np.uint8)).decode(errors="replace"))
    return " ".join(map(str, tokens.tolist()))
