"""Clipping of updates: by how far the gradient exceeds its second moment, and by earlier updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.checks import check_decay_rates, check_positive, check_whole
from ..core.transformation import transformation, with_extra_args
from ._arithmetic import global_norm, scale
from ._layers import STACKED, Stacked, layer_rms, map_layers
from ._moments import moment_state
from ._window import Window, empty_window, push, threshold


@checked
def with_update_clipping(
    direction: optax.GradientTransformation,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    layers: Stacked = STACKED,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, made smaller where its second moment lags behind: StableAdamW.

    .. math:: u_t / \max(1, \mathrm{RMS}_t), \qquad
        \mathrm{RMS}_t = \sqrt{\operatorname{mean} \, g_t^2 / \max(\hat v_t, \epsilon^2)}

    with :math:`\hat v_t = v_t / (1 - \beta_2^t)`, by leaf, and of stacked layers by layer. In the
    paper the learning rate is divided, and weight decay with it: for that, give a chain of direction and
    decay; wrap the direction alone to leave the decay as it is.

    Args:
      direction: one whose state has a second moment ``nu`` like the parameters and a ``count``, as
        ``ravine.scale_by_adam`` and ``optax.scale_by_adam``.
      b2: that of the direction, for the correction of its start.
      eps: that of the direction.
      layers: which leaves are stacked layers.

    Raises:
      ValueError: for values out of range, or a direction without second moment.

    Source: Wortsman et al., 2023, https://arxiv.org/abs/2304.13013, algorithm 2.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> adam = ravine.scale_by_adam(b1=0.0, b2=0.75)
      >>> tx, params = ravine.stability.with_update_clipping(adam, b2=0.75), jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for gradient in (1.0, 1.0, 100.0):  # Adam's direction would be 1, 1, 1.52
      ...     update, state = tx.update(jnp.array([gradient]), state, params)
      ...     print(update.round(4))
      [1.]
      [1.]
      [1.]
    """
    check_decay_rates(b2=b2)
    check_positive(eps=eps)
    inner = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> Any:
        state = inner.init(params)
        moment_state(state, params, "with_update_clipping")
        return state

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        found, state = inner.update(updates, state, params, **extra)
        moments = moment_state(state, updates, "with_update_clipping")
        weight = 1 - b2 ** moments.count.astype(jnp.float32)

        def clipped(axes: tuple[int, ...], u: jax.Array, g: jax.Array, nu: jax.Array) -> jax.Array:
            g = wide(g)
            v = jnp.maximum(nu.astype(g.dtype) / weight.astype(g.dtype), eps**2)
            rms = layer_rms(axes, g * jax.lax.rsqrt(v))
            return scale(u, jnp.where(jnp.isfinite(rms) & (rms > 1), 1 / rms, 1))

        return map_layers(clipped, layers, found, updates, moments.nu), state

    return with_extra_args(init, update)


class ClipUpdateNormState(NamedTuple):
    """State of `clip_update_norm`."""

    norms: Window  # of the updates before clipping


@checked
def clip_update_norm(
    *, deviations: float = 3.0, window: int = 128, warmup: int = 64
) -> optax.GradientTransformation:
    r"""Last in a chain: the norm of the whole update stays below the mean and k deviations of the last.

    The norms remembered are those before clipping: with those after it, each clipped update would lower
    the limit for the next, down to nothing. Non-finite updates are neither clipped nor remembered.

    Args:
      deviations: k, of which each counts for at least a hundredth of the mean.
      window: number of past updates, at least 1.
      warmup: updates before any is clipped, 1 to `window`.

    Raises:
      ValueError: for values out of range.

    Source: levanter, ``optim/clip_update_norm.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.clip_update_norm(warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for update in (1.0, 1.0, 9.0):
      ...     clipped, state = tx.update(jnp.array([update]), state)
      ...     print(clipped)
      [1.]
      [1.]
      [1.03]
    """
    check_positive(deviations=deviations)
    check_whole(1, window=window, warmup=warmup)
    if warmup > window:
        raise ValueError(f"warmup must be at most the window of {window} updates, got {warmup}.")

    def init(params: optax.Params) -> ClipUpdateNormState:
        del params
        return ClipUpdateNormState(empty_window(window))

    def update(
        updates: optax.Updates, state: ClipUpdateNormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipUpdateNormState]:
        del params
        norm = global_norm(updates)
        finite = jnp.isfinite(norm)
        limit = threshold(state.norms, deviations)
        clips = finite & (norm > limit) & (state.norms.count >= warmup)
        factor = jnp.where(clips, limit / norm, 1)
        pushed = push(state.norms, norm)
        norms = jax.tree.map(lambda new, old: jnp.where(finite, new, old), pushed, state.norms)
        return jax.tree.map(lambda u: scale(u, factor), updates), ClipUpdateNormState(norms)

    return transformation(init, update)
