"""Constructors of transformations, typed for states that are `NamedTuple`s of our own.

Every update refuses gradients that do not fit the parameters or, without parameters, the state of the
same shape, and moves those that a mesh cuts otherwise to where the parameters are. If it fails with a
state that another optimizer made, the error says so.

Transformations made here can be watched: under :func:`watching`, every `init` reports its parameters
and what its link does to each. That is how `ravine.explain` sees through ``optax.chain``,
``partition`` and ``masked``: the description comes from the code that runs.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from .fit import check_fit, parameters_of
from .mapped import mapped_as_arguments
from .placed import placed_like
from .state_fit import StateMismatchError, check_state

Describe = Callable[[Any], Mapping[str, Any]]
"""From the parameters to a description: one text for all of them, or a list with one per leaf."""


class Link(NamedTuple):
    """A transformation, and the parameters it was given."""

    name: str  # of the function that makes it
    params: Any
    says: Mapping[str, Any]


_links: contextvars.ContextVar[list[Link] | None] = contextvars.ContextVar("links", default=None)


def transformation(
    init: Callable[..., Any],
    update: Callable[..., tuple[Any, Any]],
    describe: Describe | None = None,
    name: str | None = None,
) -> optax.GradientTransformation:
    """`optax.GradientTransformation(init, update)` that can be watched.

    Args:
      init: as in Optax.
      update: likewise.
      describe: describes what happens to parameters.
      name: of the function that makes it; by default the one in which `update` is defined.
    """
    return optax.GradientTransformation(
        _watched(init, update, describe, name), _fitting(update, init)
    )


def with_extra_args(
    init: Callable[..., Any],
    update: Callable[..., tuple[Any, Any]],
    describe: Describe | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Like `transformation`, with extra arguments for `update`."""
    return optax.GradientTransformationExtraArgs(
        _watched(init, update, describe, name), _fitting(update, init)
    )


@contextlib.contextmanager
def watching() -> Iterator[list[Link]]:
    """Collects the links whose `init` is called inside, in the order of the calls."""
    links: list[Link] = []
    token = _links.set(links)
    try:
        yield links
    finally:
        _links.reset(token)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Nobody sees the links whose `init` is called inside."""
    token = _links.set(None)
    try:
        yield
    finally:
        _links.reset(token)


def _watched(
    init: Any, update: Any, describe: Describe | None, given: str | None = None
) -> Callable[..., Any]:
    name = given or update.__qualname__.partition(".")[0].lstrip("_")

    @functools.wraps(init)
    def watched(params: Any, *args: Any, **kwargs: Any) -> Any:
        _report(name, params, describe)
        return mapped_as_arguments(init(params, *args, **kwargs))

    return watched


def _report(name: str, params: Any, describe: Describe | None) -> None:
    # Not in `watched`, which cloudpickle copies with what it names; a context variable has no copy.
    links = _links.get()
    if links is not None:
        links.append(Link(name, params, {} if describe is None else describe(params)))


def _fitting(
    update: Callable[..., tuple[Any, Any]], init: Callable[..., Any]
) -> Callable[..., tuple[Any, Any]]:
    @functools.wraps(update)
    def checked(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        like = parameters_of(state) if params is None else params
        try:
            check_fit("gradient", updates, like)
        except ValueError:
            if _has_states(params) and not _has_states(updates):
                raise ValueError(
                    "params is the state of an optimizer; call tx.update(grads, state, params)."
                ) from None
            raise
        updates = placed_like(updates, like)
        try:
            updates, state = update(updates, state, params, **extra)
        except StateMismatchError:
            raise
        except Exception:
            if params is not None:
                with unwatched():
                    check_state(state, init, params)
            raise
        return updates, mapped_as_arguments(state)

    return checked


def states_of(kind: type | tuple[type, ...], opt_state: Any) -> list[Any]:
    """Every state of one kind in `opt_state`, however deep it is chained, masked or partitioned."""
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(node)]


def _has_states(tree: Any) -> bool:
    is_state = lambda node: hasattr(node, "_fields") and type(node).__name__.endswith("State")
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def map_states(
    kind: type | tuple[type, ...], function: Callable[[Any], Any], opt_state: Any
) -> Any:
    """`opt_state` with `function` of every state of one kind, or several, in its place."""
    is_kind = lambda node: isinstance(node, kind)
    return jax.tree.map(lambda x: function(x) if is_kind(x) else x, opt_state, is_leaf=is_kind)
