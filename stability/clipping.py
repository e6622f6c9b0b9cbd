"""Clipping of gradients and updates by their own size.

Clipping is not a guard: infinities and NaN pass through all of these and stay in their elements.
:func:`ravine.stability.finite_gate` around the chain keeps them out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import check_positive
from ..core.transformation import transformation
from ._arithmetic import global_norm, scale
from ._layers import STACKED, Stacked, layer_rms, map_layers


@checked
def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    r"""Scales the whole gradient down to a norm of at most c.

    .. math:: g \min(1, c / \lVert g \rVert)

    The norm is float32 whatever the leaves are: the squares of a hundred float16 numbers of 300 overflow
    in float16, and ``optax.clip_by_global_norm`` then returns zeros. A gradient that is not finite
    is left as it is, where Optax's turns its infinities into NaN and all the rest into zeros.

    Args:
      max_norm: c; 1.0 in most published runs.

    Raises:
      ValueError: unless `max_norm` is positive and finite.

    Source: Pascanu et al., 2013, https://arxiv.org/abs/1211.5063.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.clip_by_global_norm(1.0)
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0]
      Array([0.6, 0.8], dtype=float32)
    """
    check_positive(max_norm=max_norm)

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = global_norm(updates)
        factor = jnp.where(jnp.isfinite(norm) & (norm > max_norm), max_norm / norm, 1)
        return jax.tree.map(lambda g: scale(g, factor), updates), state

    return transformation(optax.init_empty_state, update)


@checked
def clip_by_block_rms(
    max_rms: float = 1.0, *, layers: Stacked = STACKED
) -> optax.GradientTransformation:
    r"""Scales every leaf, and of stacked layers every layer, down to a root mean square of at most d.

    .. math:: u / \max(1, \operatorname{RMS}(u) / d)

    After a direction this is the update clipping of Adafactor.

    Args:
      max_rms: d; 1.0 in Adafactor.
      layers: which leaves are stacked layers.

    Raises:
      ValueError: unless `max_rms` is positive and finite.

    Source: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.clip_by_block_rms(1.0)
      >>> tx.update({"a": jnp.array([3.0, 3.0]), "b": jnp.array([0.5])}, tx.init({}))[0]
      {'a': Array([1., 1.], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    check_positive(max_rms=max_rms)

    def clipped(axes: tuple[int, ...], u: jax.Array) -> jax.Array:
        rms = layer_rms(axes, u)
        return scale(u, jnp.where(jnp.isfinite(rms) & (rms > max_rms), max_rms / rms, 1))

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return map_layers(clipped, layers, updates), state

    return transformation(optax.init_empty_state, update)
