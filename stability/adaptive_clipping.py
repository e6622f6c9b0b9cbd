"""Clipping by the size of the weights (AGC) and by each tensor's own history (AdaGC)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import check_decay_rates, check_positive, check_whole
from ..core.leaves import at_leaves, from_leaves
from ..core.paths import path_string
from ..core.transformation import transformation
from ..core.tree_checks import check_params_given
from ._arithmetic import global_norm, scale
from ._layers import STACKED, Stacked, layer_norm, map_layers, within_layer


@checked
def clip_adaptively(
    ratio: float = 0.01,
    eps: float = 1e-3,
    *,
    layers: Stacked = STACKED,
    inputs: Callable[[str], tuple[int, ...]] | None = None,
) -> optax.GradientTransformation:
    r"""Adaptive gradient clipping (AGC): no unit's gradient is large beside the unit's weights.

    .. math::
        g_i \min\!\left(1, \lambda \frac{\max(\lVert w_i \rVert, \epsilon)}{\lVert g_i \rVert}\right)

    A unit is one index of the last axis, all others being its inputs: a column of `[in, out]`, a filter
    of `[height, width, in, out]`. A vector is one unit, also where vectors of layers are stacked. The
    paper leaves the last layer out; ``optax.masked`` does.

    Args:
      ratio: :math:`\lambda`.
      eps: :math:`\epsilon`, so that weights that start at zero can move.
      layers: which leaves are stacked layers.
      inputs: from a leaf's path to the axes that are inputs, where that is not all but the last:
        ``(-3,)`` for `[in, heads, width]`.

    Raises:
      ValueError: for values out of range, or without parameters at the update.

    Source: Brock et al., 2021, https://arxiv.org/abs/2102.06171.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.stability.clip_adaptively(0.1), jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> tx.update(jnp.ones((2, 2)) * 0.5, tx.init(params), params)[0]
      Array([[0.35355338, 0.07071068],
             [0.35355338, 0.07071068]], dtype=float32)
    """
    check_positive(ratio=ratio, eps=eps)

    def clipped(path: Any, g: jax.Array, w: jax.Array) -> jax.Array:
        axes = within_layer(path, g, layers)
        if inputs is not None:
            axes = inputs(path_string(path))
        elif len(axes) > 1:
            axes = axes[:-1]
        limit = ratio * jnp.maximum(layer_norm(axes, w), eps)
        norm = layer_norm(axes, g)
        clips = jnp.isfinite(norm) & (norm > limit.astype(norm.dtype))
        return scale(g, jnp.where(clips, limit.astype(norm.dtype) / norm, 1))

    def update(updates: optax.Updates, state: Any, params: Any = None) -> tuple[Any, Any]:
        check_params_given(params, "clip_adaptively")
        return jax.tree_util.tree_map_with_path(clipped, updates, params), state

    return transformation(optax.init_empty_state, update)


class AdaGCState(NamedTuple):
    """State of `adagc`."""

    count: jax.Array  # int32 scalar, finite gradients seen so far
    norms: Any  # like params, float32, size 1 but along layers: their usual norms; inf before any


@checked
def adagc(
    ratio: float = 1.05,
    decay: float = 0.98,
    *,
    warmup: int = 100,
    warmup_norm: float = 1.0,
    layers: Stacked = STACKED,
) -> optax.GradientTransformation:
    r"""AdaGC: no tensor's gradient is much larger than that tensor's gradients have been.

    .. math::
        \hat g_t = g_t \min\!\left(1, \lambda\,\frac{\gamma_{t-1}}{\lVert g_t \rVert}\right), \qquad
        \gamma_t = \beta\,\gamma_{t-1} + (1 - \beta) \lVert \hat g_t \rVert

    In warm-up the whole gradient is clipped to a global norm instead, and :math:`\gamma` is the smallest
    norm that a tensor has had. Norms of zero do not count: otherwise a tensor behind a head that starts
    at zero would never move again. A gradient that is not finite passes; the statistics skip it.

    Args:
      ratio: :math:`\lambda`, at least 1.
      decay: :math:`\beta`.
      warmup: steps of warm-up; not negative.
      warmup_norm: the global norm clipped to meanwhile.
      layers: which leaves are stacked layers.

    Raises:
      ValueError: for values out of range.

    Source: Wang et al., 2025, https://arxiv.org/abs/2502.11034, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.adagc(warmup=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (0.5, 8.0):
      ...     clipped, state = tx.update(jnp.array([gradient]), state)
      ...     print(clipped)
      [0.5]
      [0.525]
    """
    check_decay_rates(decay=decay)
    check_positive(ratio=ratio, warmup_norm=warmup_norm)
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, or every gradient is clipped, got {ratio!r}.")
    check_whole(0, warmup=warmup)

    def unknown(axes: tuple[int, ...], p: jax.Array) -> jax.Array:
        return jnp.full_like(layer_norm(axes, p), jnp.inf, dtype=jnp.float32)

    def init(params: optax.Params) -> AdaGCState:
        norms = jax.tree.leaves(map_layers(unknown, layers, params))
        return AdaGCState(jnp.zeros([], jnp.int32), at_leaves(params, norms))

    def update(
        updates: optax.Updates, state: AdaGCState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaGCState]:
        del params
        whole = global_norm(updates)
        finite, warm = jnp.isfinite(whole), state.count < warmup
        common = jnp.where(whole > warmup_norm, warmup_norm / whole, 1)
        norm_of = lambda axes, g: layer_norm(axes, g).astype(jnp.float32)
        norms = jax.tree.leaves(map_layers(norm_of, layers, updates))
        usual = from_leaves(updates, state.norms)

        def factor(norm: jax.Array, usual: jax.Array) -> jax.Array:
            own = jnp.where(norm > ratio * usual, ratio * usual / norm, 1)
            return jnp.where(finite, jnp.where(warm, common, own), 1)

        def learnt(norm: jax.Array, usual: jax.Array, by: jax.Array) -> jax.Array:
            clipped = norm * by
            smallest = jnp.where(clipped > 0, jnp.minimum(usual, clipped), usual)
            mean = decay * usual + (1 - decay) * clipped
            new = jnp.where(warm | jnp.isinf(usual), smallest, mean)
            return jnp.where(finite, new, usual)

        factors = list(map(factor, norms, usual))
        new = AdaGCState(
            state.count + finite.astype(jnp.int32),
            at_leaves(updates, list(map(learnt, norms, usual, factors))),
        )
        leaves, structure = jax.tree.flatten(updates)
        return jax.tree.unflatten(structure, list(map(scale, leaves, factors))), new

    return transformation(init, update)
