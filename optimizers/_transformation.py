"""Constructors of transformations, typed for states that are `NamedTuple`s of our own."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformation:
    """`optax.GradientTransformation(init, update)`."""
    return optax.GradientTransformation(init, update)


def with_extra_args(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """`optax.GradientTransformationExtraArgs(init, update)`."""
    return optax.GradientTransformationExtraArgs(init, update)


def states_of(kind: type | tuple[type, ...], opt_state: Any) -> list[Any]:
    """Every state of one kind in `opt_state`, however deep it is chained, masked or partitioned."""
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(node)]


def map_states(
    kind: type | tuple[type, ...], function: Callable[[Any], Any], opt_state: Any
) -> Any:
    """`opt_state` with `function` of every state of one kind, or several, in its place."""
    is_kind = lambda node: isinstance(node, kind)
    return jax.tree.map(lambda x: function(x) if is_kind(x) else x, opt_state, is_leaf=is_kind)
