"""SPAM: spikes clipped element by element, and moments reset from time to time."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.checks import check_positive, check_whole
from ..core.transformation import with_extra_args
from ._moments import map_moments, moment_state


class SpamState(NamedTuple):
    """State of `spam`."""

    count: jax.Array  # int32 scalar, updates made so far
    inner: Any  # the direction's


@checked
def spam(
    direction: optax.GradientTransformation,
    *,
    threshold: float = 5000.0,
    reset_every: int = 500,
    rewarm: int = 150,
    settle: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""A direction like Adam's, with spike-aware clipping and momentum reset.

    An element whose square is beyond :math:`\theta` times its second moment is cut down to it,

    .. math:: g \leftarrow \operatorname{sign}(g) \sqrt{\theta v} \quad\text{where } g^2 > \theta v,

    and every :math:`\Delta T` updates both moments are set to zero. The updates from then on are scaled
    by :math:`1 - 0.99 \cdot \tfrac12 (1 + \cos \pi s / (N + 1))` in their s-th step, N of them.
    Non-finite values are not treated as spikes and pass: guard the chain with ``finite_gate``. Elements
    without a second moment yet are not clipped, where the authors' code sets them to zero, and so
    keeps them there: the embedding of a token first seen after `settle` would not move before the
    next reset.

    Args:
      direction: one whose state has moments ``mu`` and ``nu`` like the parameters and a ``count``, as
        ``scale_by_adam``; as in the authors' code the count of its bias correction goes on.
      threshold: :math:`\theta`.
      reset_every: :math:`\Delta T`, at least 1.
      rewarm: N, not negative.
      settle: updates at the start, and after each reset, before anything is clipped.

    Raises:
      ValueError: for values out of range, or a direction without second moment.

    Source: Huang et al., 2025, https://arxiv.org/abs/2501.06842; TianjinYellow/SPAM-Optimizer,
    ``galore_torch/SPAM.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.spam(ravine.scale_by_adam(), threshold=4.0, settle=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for gradient in (1.0, 1.0, 1e6):  # v is 0.002, so the last counts as the root of 0.008
      ...     update, state = tx.update(jnp.array([gradient]), state)
      >>> round(float(update[0]), 4)
      0.8118
    """
    check_positive(threshold=threshold)
    check_whole(1, reset_every=reset_every)
    check_whole(0, rewarm=rewarm, settle=settle)
    inner = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> SpamState:
        state = inner.init(params)
        moment_state(state, params, "spam")
        return SpamState(jnp.zeros([], jnp.int32), state)

    def update(
        updates: optax.Updates,
        state: SpamState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SpamState]:
        at = state.count + 1
        since = at % reset_every  # updates since the last reset, or since the start

        def reset(name: str, moments: Any) -> Any:
            del name
            return jax.tree.map(lambda m: jnp.where(since == 0, 0, m), moments)

        inner_state = map_moments(reset, state.inner)
        nu = moment_state(inner_state, updates, "spam").nu
        clips = (at >= settle) & (since >= settle)

        def clipped(g: jax.Array, v: jax.Array) -> jax.Array:
            x = wide(g)
            limit = jnp.sqrt(threshold * v.astype(x.dtype))
            spike = clips & (v > 0) & jnp.isfinite(x) & (jnp.abs(x) > limit)
            return jnp.where(spike, jnp.sign(x) * limit, x).astype(g.dtype)

        found, inner_state = inner.update(
            jax.tree.map(clipped, updates, nu), inner_state, params, **extra
        )
        # The authors reset at update dT and scale from there on, with step 0 first.
        warming = (at >= reset_every) & (since < rewarm)
        cosine = 0.5 * (1 + jnp.cos(math.pi * since.astype(jnp.float32) / (rewarm + 1)))
        factor = jnp.where(warming, 1 - 0.99 * cosine, 1)
        found = jax.tree.map(
            lambda u: (wide(u) * factor.astype(wide(u).dtype)).astype(u.dtype), found
        )
        return found, SpamState(at, inner_state)

    return with_extra_args(init, update)
