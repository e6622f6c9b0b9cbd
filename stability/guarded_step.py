"""The parts of a guard, and a guarded step: one condition around update and addition.

A guard that is a transformation has to return updates, zeros for a skipped step: XLA writes them, and
copies the state as well. If the condition chooses between old and new parameters and state instead,
donated buffers are updated in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.mapped import cond
from ..core.transformation import with_extra_args
from ..optimizers.links.clock import advance

Decide = Callable[[Any, Any, Any], tuple[jax.Array, Callable[[Any], Any]]]
"""From gradients, the guard's state and the loss: whether the step is made, and what makes the guard's
next state from the inner one."""


class Guarded(optax.GradientTransformationExtraArgs):
    """A guard around an optimizer: a transformation, and the parts that `guarded_step` puts together."""

    inner: optax.GradientTransformationExtraArgs
    """The optimizer inside."""
    decide: Decide
    """The guard's judgement."""
    around: Callable[[optax.GradientTransformation], "Guarded"]
    """The same guard around another optimizer, as after ``ravine.on_mesh``."""


def guarded(
    name: str,
    init: Callable[[optax.Params], Any],
    inner: optax.GradientTransformationExtraArgs,
    decide: Decide,
    around: Callable[[optax.GradientTransformation], Guarded],
) -> Guarded:
    """The guard of that name: its transformation, and its parts."""

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        made, finish = decide(updates, state, extra.get("loss"))

        def make() -> tuple[Any, Any]:
            found, inner_state = inner.update(updates, state.inner, params, **extra)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), found, updates), inner_state

        # -0, since adding 0 would turn a parameter of -0 into 0.
        unchanged = lambda: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
        keep = lambda: (unchanged(), advance(state.inner))
        updates, inner_state = cond(made, make, keep)
        return updates, finish(inner_state)

    tx = with_extra_args(init, update, name=name)
    found = Guarded(tx.init, tx.update)
    found.inner, found.decide, found.around = inner, decide, around
    return found


class GuardedStep(NamedTuple):
    """What `guarded_step` returns."""

    params: Any
    state: Any
    update_norm: jax.Array
    """float32; 0 for a skipped step."""


def guarded_step(
    tx: Guarded, grads: optax.Updates, state: Any, params: optax.Params, **extra: Any
) -> GuardedStep:
    """`tx.update` and ``optax.apply_updates`` in one, under one condition.

    Parameters and state are those of the two calls. On AdamW the transformation takes 1.5 to 3 times the
    time of the optimizer alone, this one 1.15 times (docs/log.md, 2026-11-28): use it where a train
    step is written by hand, as `ravine.training.step.make_train_step` does.

    Args:
      tx: what `finite_gate` or `skip_step` returned, outermost around the optimizer.
      grads: a tree like the parameters.
      state: of `tx`.
      params: what is updated.
      extra: ``loss=``, which the guard checks, and further arguments for the optimizer inside.

    Raises:
      TypeError: for another transformation.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import finite_gate, guarded_step
      >>> tx, params = finite_gate(ravine.sgd(0.5)), jnp.array([1.0, 1.0])
      >>> step = guarded_step(tx, jnp.array([2.0, jnp.nan]), tx.init(params), params, loss=1.0)
      >>> step.params, int(step.state.skipped)
      (Array([1., 1.], dtype=float32), 1)
    """
    if not isinstance(tx, Guarded):
        raise TypeError("tx must be what finite_gate or skip_step gave; put the guard outermost.")
    made, finish = tx.decide(grads, state, extra.get("loss"))

    def make() -> tuple[Any, Any, jax.Array]:
        updates, inner = tx.inner.update(grads, state.inner, params, **extra)
        norm = optax.tree.norm(updates).astype(jnp.float32)
        return optax.apply_updates(params, updates), inner, norm

    keep = lambda: (params, advance(state.inner), jnp.zeros([], jnp.float32))
    params, inner, norm = cond(made, make, keep)
    return GuardedStep(params, finish(inner), norm)
