r"""Grafting: the direction of one optimizer with the size of another's step.

A preconditioner gives a good direction, but not a reliable step size: stale roots, a ridge and a wrong
exponent change the norm of its step by orders of magnitude, and with it the learning rate that works.
So the norm is taken from an optimizer with a step size that is known to work:

.. math:: u = \frac{\lVert d \rVert}{\lVert p \rVert} \, p

with :math:`p` the preconditioned and :math:`d` the other update.

Source: Agarwal et al., 2020, https://arxiv.org/abs/2002.11803 (AdaGraft).
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import (
    cast,
    ema,
    increment,
    over_root,
    scalar,
    wide,
    wide_dtype,
)
from ...core.checks import check_decay_rates, check_non_negative
from ...core.kinds import MaybeInfinite
from ...core.transformation import transformation
from ..matrix.mesh.exchange import largest
from ..matrix.mesh.placement import Names

Graft = Literal["none", "sgd", "adagrad", "rmsprop", "adam", "adamw", "sign"]
WITHOUT_MOMENTS = ("none", "sgd", "sign")


def norm_ratio(
    magnitude: jax.Array,
    direction: jax.Array,
    axes: tuple[int, ...],
    *,
    keep: bool = True,
    summed: Names = (),
) -> jax.Array:
    """`|magnitude| / |direction|` over some axes; where the direction is zero, one.

    Args:
      magnitude: an array.
      direction: one of the same shape.
      axes: the axes summed over.
      keep: keep them as axes of size one.
      summed: mesh axes that cut the arrays along these axes, inside `jax.shard_map`.

    Both are divided by their largest element first, so that squares neither overflow nor vanish.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.links.graft import norm_ratio
      >>> norm_ratio(jnp.array([3e-30, 4e-30]), jnp.array([1e-30, 0.0]), (0,), keep=False)
      Array(5., dtype=float32)
    """
    both = [x.astype(wide_dtype(x.dtype)) for x in (magnitude, direction)]
    most = [jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0) for x in both]
    above, below = most = largest(most, summed) if summed else most
    scaled = [x / jnp.where(m > 0, m, 1) for x, m in zip(both, most, strict=True)]
    squares = [jnp.sum(jnp.square(x), axis=axes, keepdims=True) for x in scaled]
    over, under = map(jnp.sqrt, jax.lax.psum(squares, summed))
    nothing = below == 0
    ratio = above / jnp.where(nothing, 1, below) * (over / jnp.where(nothing, 1, under))
    ratio = jnp.where(nothing, 1, ratio)
    return ratio if keep else jnp.squeeze(ratio, axes)


class Magnitude(NamedTuple):
    """An optimizer that lends its step size, see `magnitude`; it shares the other's momentum."""

    name: Graft
    b2: Any
    eps: Any

    @property
    def has_moments(self) -> bool:
        """Whether it keeps second moments."""
        return self.name not in WITHOUT_MOMENTS

    def update(self, g: Any, mean: Any, nu: Any, count: jax.Array) -> tuple[Any, Any]:
        """From (gradients, their mean, moments, steps including this one) to (step, moments)."""
        if not self.has_moments:
            return jax.tree.map(jnp.sign, mean) if self.name == "sign" else mean, nu
        if self.name == "adagrad":
            wider = lambda x, v: cast(v, wide_dtype(v.dtype, x.dtype)) + jnp.square(wide(x))
            moments = jax.tree.map(wider, g, nu)
        else:
            moments = ema(g, nu, self.b2, jnp.square)
        b2 = self.b2 if self.name in ("adam", "adamw") else None
        return over_root(mean, moments, b2, count, self.eps), moments


def magnitude(name: Graft, b2: float = 0.999, eps: float = 1e-8) -> Magnitude:
    r"""The step to graft, by name; :math:`\hat g` is the mean of gradients that the direction is
    computed from.

    ===================  ==========================================================================
    ``none``             :math:`\hat g` before the start step, no grafting after it
    ``sgd``              :math:`\hat g`
    ``sign``             :math:`\operatorname{sign} \hat g`
    ``adagrad``          :math:`\hat g / (\sqrt{\sum g^2} + \epsilon)`
    ``rmsprop``          :math:`\hat g / (\sqrt{v} + \epsilon)`, v the moving average of :math:`g^2`
    ``adam``, ``adamw``  the same, v divided by :math:`1 - \beta_2^t`; decay is a link of its own
    ===================  ==========================================================================

    Raises:
      ValueError: for an unknown name, or a decay rate that the named optimizer cannot have.

    Example:
      >>> from ravine.optimizers.links.graft import magnitude
      >>> adam = magnitude("adam", b2=0.95)
    """
    if name not in get_args(Graft):
        raise ValueError(f"unknown graft {name!r}; known: {', '.join(get_args(Graft))}.")
    check_non_negative(eps=eps)
    if name not in ("adagrad", *WITHOUT_MOMENTS):
        try:
            check_decay_rates(**{"graft.b2": b2})
        except ValueError as error:
            raise ValueError(
                f"the graft {name!r} averages squared gradients: {error} With b2=1 (sums), give "
                "graft.b2, or 'adagrad' for graft.step."
            ) from None
    return Magnitude(name, b2, eps)


class GraftState(NamedTuple):
    """State of `graft`."""

    count: jax.Array  # int32 scalar, updates made so far
    direction: Any  # state of the direction's transformation
    magnitude: Any  # state of the magnitude's transformation


@checked
def graft(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    *,
    start: MaybeInfinite = 1,
) -> optax.GradientTransformation:
    r"""The direction of one transformation with the norm of another's update, parameter by parameter.

    .. math:: u = \frac{\lVert d \rVert}{\lVert p \rVert} \, p

    Both see the gradients and keep their own state; before the start step the update is :math:`d`.

    Args:
      direction: gives p; any transformation, such as ``ravine.scale_by_muon()``.
      magnitude: gives d, such as ``ravine.scale_by_adam()``.
      start: the first step, counted from one, that uses p; infinity for never.

    Raises:
      ValueError: if `start` is below one.

    Source: Agarwal et al., 2020, https://arxiv.org/abs/2002.11803.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx = ravine.graft(optax.identity(), ravine.scale_by_adam())
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(u), 3) for u in updates]  # as long as Adam's (1, 1)
      [0.849, 1.131]
    """
    if not start >= 1:
        raise ValueError(f"start must be a step from 1 on, got {start!r}.")

    def init(params: optax.Params) -> GraftState:
        return GraftState(jnp.zeros([], jnp.int32), direction.init(params), magnitude.init(params))

    def update(
        updates: optax.Updates, state: GraftState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GraftState]:
        count = increment(state.count)
        pointing, direction_state = direction.update(updates, state.direction, params)
        sized, magnitude_state = magnitude.update(updates, state.magnitude, params)
        started = count >= start if math.isfinite(start) else jnp.zeros([], bool)

        def grafted(p: jax.Array, d: jax.Array) -> jax.Array:
            ratio = norm_ratio(d, p, tuple(range(p.ndim)))
            new = wide(p) * scalar(ratio, wide(p).dtype)
            return jnp.where(started, new.astype(d.dtype), d)

        grafted_updates = jax.tree.map(grafted, pointing, sized)
        return grafted_updates, GraftState(count, direction_state, magnitude_state)

    return transformation(init, update)
