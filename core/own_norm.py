r"""The norm in which an optimizer sees a gradient, :math:`\langle G, P[G] \rangle`, told by itself.

An optimizer that preconditions matrices is declared with `with_norm`; `norms_in` finds such parts in any
optimizer, however deep they are chained, masked or partitioned, by calling its `init` on shapes. So the
norm is computed by the code that knows the options, and nobody else reads its state.
"""

import contextvars
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from jax.sharding import PartitionSpec

from .paths import path_string, paths_of
from .transformation import unwatched


class OwnNorm(NamedTuple):
    """Of one parameter, scalars in at least float32."""

    square: jax.Array  # <G, P[G]>
    trace: jax.Array  # of P, over as many coordinates as the parameter has elements


Norms = Callable[[Any, Any], dict[str, OwnNorm]]
"""From gradients and the state before them to norms, by path."""


class _Told(NamedTuple):
    name: str
    paths: Any  # like the parameters it was given, their paths
    state: Any
    norms: Norms


_told: contextvars.ContextVar[list[_Told] | None] = contextvars.ContextVar("told", default=None)


class NoOwnNorm(ValueError):
    """The optimizer has no such norm, or none that can be told."""


Transformation = TypeVar("Transformation", bound=optax.GradientTransformation)


def with_norm(tx: Transformation, name: str, norms: Norms) -> Transformation:
    """`tx`, with the norm in which it sees a gradient; norms of its parts do not count.

    Args:
      tx: any transformation.
      name: of the function that makes it.
      norms: raises `NoOwnNorm` where there is none.
    """

    def init(params: optax.Params) -> Any:
        return _telling_init(tx, name, norms, params)

    return tx._replace(init=init)


def _telling_init(
    tx: optax.GradientTransformation, name: str, norms: Norms, params: optax.Params
) -> Any:
    # Not in `with_norm`: cloudpickle copies local functions with what they name, and cannot copy a
    # context variable.
    told = _told.get()
    if told is None:
        return tx.init(params)
    token = _told.set(None)
    try:
        state = tx.init(params)
    finally:
        _told.reset(token)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path_string(path), params)
    told.append(_Told(name, paths, state, norms))
    return state


def norms_in(
    tx: optax.GradientTransformation, grads: optax.Updates, opt_state: Any
) -> dict[str, OwnNorm]:
    """The norms of gradients in all parts of `tx` that tell them, by path."""
    leaves = dict(zip(paths_of(grads), jax.tree.leaves(grads), strict=True))
    found: dict[str, OwnNorm] = {}
    owners: dict[str, str] = {}
    for each, where in _asked(tx, grads):
        try:
            part = jax.tree.map(leaves.__getitem__, each.paths)
            state = _at(opt_state, where)
        except (AttributeError, IndexError, KeyError, TypeError):
            raise ValueError(
                f"opt_state has no state of {each.name} where tx has it; give the state that "
                "tx.init returns for these parameters."
            ) from None
        for path, norm in each.norms(part, state).items():
            if path in found:
                raise NoOwnNorm(
                    f"the parameter {path!r} has no norm of its own: both {owners[path]} and "
                    f"{each.name} precondition its gradient."
                )
            found[path], owners[path] = norm, each.name
    return found


def _asked(tx: optax.GradientTransformation, grads: optax.Updates) -> list[tuple[_Told, Any]]:
    """The parts that tell norms, and the paths of their states."""
    found: list[tuple[_Told, Any]] = []

    def traced(params: Any) -> None:
        told: list[_Told] = []
        token = _told.set(told)
        try:
            with unwatched():
                state = tx.init(params)
        finally:
            _told.reset(token)
        found.extend((each, _where(each, state)) for each in told)

    jax.eval_shape(traced, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), grads))
    return found


def _where(each: _Told, state: Any) -> Any:
    # Transformations around it may have rebuilt the state, of the same leaves.
    leaves = jax.tree.leaves(each.state)

    def is_it(node: Any) -> bool:
        if type(node) is not type(each.state):
            return False
        found = jax.tree.leaves(node)
        return len(found) == len(leaves) and all(map(operator.is_, found, leaves))

    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_it):
        if is_it(node):
            return path
    raise NoOwnNorm(
        f"the norm of {each.name} cannot be told here: a transformation around it changes its state."
    )


def _at(node: Any, path: Any) -> Any:
    for key in path:
        if isinstance(node, optax.InjectStatefulHyperparamsState):
            raise NoOwnNorm(
                "optax.inject_hyperparams hides the norm of what it builds, which depends on "
                "hyperparameters; take ravine.inject_hyperparams."
            )
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        else:
            node = node[getattr(key, "key", getattr(key, "idx", None))]
    return node


def replicated_norms(grads: Any) -> list[Any]:
    """How the norms of all leaves are cut on a mesh: not at all."""
    whole: Any = PartitionSpec()
    return [OwnNorm(whole, whole) for _ in jax.tree.leaves(grads)]
