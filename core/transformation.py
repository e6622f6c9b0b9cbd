"""Constructors of transformations, typed for states that are `NamedTuple`s of our own.

Every update is given gradients that fit the parameters or, without parameters, the state of the same
shape (:mod:`.fit`). If it fails with a state that another optimizer made, the error says so.

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

from .fit import fitting
from .mapped import mapped_as_arguments

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
        _watched(init, update, describe, name), fitting(update, _unseen(init))
    )


def with_extra_args(
    init: Callable[..., Any],
    update: Callable[..., tuple[Any, Any]],
    describe: Describe | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Like `transformation`, with extra arguments for `update`."""
    return optax.GradientTransformationExtraArgs(
        _watched(init, update, describe, name), fitting(update, _unseen(init))
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


def _unseen(init: Callable[..., Any]) -> Callable[[Any], Any]:
    def unseen(params: Any) -> Any:
        with unwatched():
            return init(params)

    return unseen


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


def states_of(kind: type | tuple[type, ...], opt_state: Any) -> list[Any]:
    """Every state of one kind in `opt_state`, however deep it is chained, masked or partitioned."""
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(node)]
