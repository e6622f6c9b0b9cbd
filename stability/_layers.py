"""Which axis of a leaf counts layers: stacked layers are treated one by one.

Under scanned layers one leaf holds the weights of all of them, and a norm or a mean over the whole leaf
would let one bad layer slow down all others.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.mapped import cond
from ..core.paths import path_string


@checked
class Stacked(NamedTuple):
    """Which leaves are stacked layers: those whose path a regular expression finds.

    Example:
      >>> from ravine.stability import Stacked
      >>> maxtext = Stacked(r"decoder/layers/", axis=1)
    """

    pattern: str | None = r"(^|/)layers/(?!\d)"
    """Searched in paths as ``layers/attention/query/kernel``; None: no leaf is. Numbered layers,
    ``layers/0/...``, are leaves of their own."""
    axis: int = 0
    """The axis that counts the layers."""


STACKED = Stacked()


def within_layer(path: Any, leaf: Any, layers: Stacked) -> tuple[int, ...]:
    """The axes of a leaf that lie within one layer."""
    stacked = layers.pattern is not None and re.search(layers.pattern, path_string(path))
    if not stacked or not leaf.ndim:
        return tuple(range(leaf.ndim))
    if not -leaf.ndim <= layers.axis < leaf.ndim:
        raise ValueError(
            f"{path_string(path)} has shape {leaf.shape} and no axis {layers.axis} of layers; "
            "correct the pattern or the axis of Stacked."
        )
    return tuple(axis for axis in range(leaf.ndim) if axis != layers.axis % leaf.ndim)


def map_layers(function: Callable[..., Any], layers: Stacked, tree: Any, *others: Any) -> Any:
    """``function(axes, leaf, *other leaves)`` of all leaves, with the axes within a layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, *rest: function(within_layer(path, leaf, layers), leaf, *rest),
        tree,
        *others,
    )


def layer_norm(axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The norm over the given axes, which are kept, in at least float32."""
    return _root(jnp.sum, axes, wide(x))


def layer_rms(axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The root mean square over the given axes, which are kept, in at least float32."""
    return _root(jnp.mean, axes, wide(x))


def _root(of: Callable[..., jax.Array], axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The root of the sum or mean of squares; infinite only if an element is.

    Where the squares overflow, elements are divided by the largest magnitude first.
    """
    root = lambda x: jnp.sqrt(of(jnp.square(x), axis=axes, keepdims=True))
    plain = root(x)
    if not x.size:
        return plain

    def divided() -> jax.Array:
        highest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        by = jnp.where(jnp.isinf(plain) & jnp.isfinite(highest), highest, 1)
        return by * root(x / by)

    return cond(jnp.any(jnp.isinf(plain)), divided, lambda: plain)
