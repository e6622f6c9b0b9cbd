"""Hyperparameters in the state, where a schedule or the user can change them."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import optax

from ..core.arguments import checked
from ..core.own_norm import OwnNorm, norms_in, with_norm
from .links.learning_rate import as_injected


@checked
def inject_hyperparams(
    builder: Callable[..., optax.GradientTransformation], *, static_args: typing.Iterable[str] = ()
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """``optax.inject_hyperparams`` for those of a builder's arguments that may be injected.

    Those are numbers from a continuous range that may change during a run: the learning rate, decay
    rates, weight decay, epsilons. Arguments that decide shapes or the program itself stay fixed: whole
    numbers, options such as ``refresh`` and ``blocks``, booleans, masks, names, dtypes.

    The learning rate may be a schedule, as may the others. ``optax.tree.get(state, "learning_rate")``
    reads the rate and ``optax.tree.set(state, learning_rate=jnp.asarray(0.1))`` sets one that is not
    scheduled.

    Args:
      builder: a function that builds an optimizer: Ravine's, Optax's or your own; an argument is
        injected if its annotation allows a float, or, without an annotation, if its default is a float.
      static_args: names of more arguments to leave as they are.

    Returns:
      A function with the arguments of `builder`.

    Raises:
      ValueError: for static arguments that the builder does not have.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx = ravine.inject_hyperparams(ravine.shampoo)(1e-3, b1=0.8, rules=[("", "matrix")])
      >>> state = tx.init({"kernel": jnp.ones((2, 3))})
      >>> float(optax.tree.get(state, "learning_rate"))
      0.0010000000474974513
      >>> "b2" in state.hyperparams, "refresh" in state.hyperparams
      (True, False)
    """
    parameters = inspect.signature(builder, eval_str=True).parameters
    static = {name for name, parameter in parameters.items() if not _takes_float(parameter)}

    function = getattr(builder, "func", builder)  # of a `functools.partial`
    name = getattr(function, "__name__", type(function).__name__)

    def injectable(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        return as_injected(builder(*args, **kwargs))

    injectable.__signature__ = inspect.signature(builder)  # pyright: ignore[reportFunctionMemberAccess]
    inject = optax.inject_hyperparams(injectable, static_args=static | set(static_args))

    @functools.wraps(inject)
    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        def norms(grads: Any, state: Any) -> dict[str, OwnNorm]:
            bound = inspect.signature(builder).bind(*args, **kwargs)
            bound.arguments.update(state.hyperparams)
            return norms_in(injectable(*bound.args, **bound.kwargs), grads, state.inner_state)

        return with_norm(inject(*args, **kwargs), name, norms)

    return build


def _takes_float(parameter: inspect.Parameter) -> bool:
    if parameter.annotation is inspect.Parameter.empty:
        return isinstance(parameter.default, float)
    return float in (parameter.annotation, *typing.get_args(parameter.annotation))
