"""Constructors of transformations, typed for states that are `NamedTuple`s of our own."""

from collections.abc import Callable
from typing import Any

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
