"""Gradients fit the parameters: they have their tree and shapes, and lie on a mesh as they do.

A gradient that broadcasts is a mistake, and is refused. One that `Explicit` axes cut otherwise than its
parameter is resharded before the update, so that neither moments nor factors are: the state keeps its
shardings from step to step, as `jax.lax.scan` and donated buffers need. Where all axes are `Auto`,
types do not say how anything is cut, and the compiler chooses (`ravine.on_mesh` tells it).

All of this happens while an update is traced, and costs nothing at run time.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import optax

from .containers import first_other
from .mapped import mapped_as_arguments
from .paths import key_names
from .state_fit import StateMismatchError, check_state

MOST_SHOWN = 4


def fitting(
    update: Callable[..., tuple[Any, Any]], init: Callable[[Any], Any]
) -> Callable[..., tuple[Any, Any]]:
    """`update` of gradients that fit; its error names a state that `init` did not make."""

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
        except Exception as error:
            if params is None:
                # Gradients have the parameters' shapes, but not always their dtypes.
                check_state(state, init, updates, dtypes=False)
            else:
                check_state(state, init, params)
                _check_containers(updates, params, error)
            raise
        return updates, mapped_as_arguments(state)

    return checked


def _check_containers(updates: Any, params: Any, error: Exception) -> None:
    """Raises if gradients that fit are held otherwise than the parameters, as by a `FrozenDict`."""
    if jax.tree.structure(updates) == jax.tree.structure(params):
        return
    if other := first_other(updates, params):
        path, kind, expected = other
        where = f" at {'/'.join(path)!r}" if path else ""
        raise ValueError(
            f"the gradients fit the parameters, but are a {kind}{where} where the parameters are a "
            f"{expected}; convert one of them, as by flax.core.unfreeze for a FrozenDict."
        ) from error


def _has_states(tree: Any) -> bool:
    is_state = lambda node: hasattr(node, "_fields") and type(node).__name__.endswith("State")
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def check_fit(what: str, tree: Any, like: Any, of: str = "parameter") -> None:
    """Raises unless `tree` has real floating-point leaves, and those of `like` with the same shapes.

    Leaves that `optax.masked` or `optax.partition` took out of one of the trees are skipped; nothing
    is compared where `like` is None.
    """
    leaves, structure = jax.tree.flatten(tree)
    if all(map(_is_real, leaves)):
        if like is None:
            return
        others, other_structure = jax.tree.flatten(like)
        if structure == other_structure and all(map(_same_shape, leaves, others)):
            return
    problems = _problems(what, tree, like, of)
    if problems:
        more = len(problems) - MOST_SHOWN
        tail = [f"and {more} more"] if more > 0 else []
        raise ValueError("; ".join([*problems[:MOST_SHOWN], *tail]) + ".")


def parameters_of(state: Any) -> Any:
    """The part of a state shaped like the parameters, found by its annotations; None if none is."""
    for field in _like_parameters(type(state)):
        if getattr(state, field) is not None:
            return getattr(state, field)
    return None


@functools.cache
def _like_parameters(kind: type) -> tuple[str, ...]:
    def is_tree(annotation: Any) -> bool:
        in_union = get_origin(annotation) in (Union, types.UnionType)
        return annotation == optax.Params or (
            in_union and set(get_args(optax.Params)) <= set(get_args(annotation))
        )

    found = getattr(kind, "__annotations__", {}) if hasattr(kind, "_fields") else {}
    return tuple(name for name, annotation in found.items() if is_tree(annotation))


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _same_shape(leaf: Any, other: Any) -> bool:
    return leaf.shape == jnp.shape(other)


def _named(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_taken)
    return {key_names(path): leaf for path, leaf in leaves}


def _problems(what: str, tree: Any, like: Any, of: str) -> list[str]:
    found, problems = _named(tree), []
    expected = found if like is None else _named(like)
    taken = [name for tree in (found, expected) for name, leaf in tree.items() if _is_taken(leaf)]

    def is_part_of_taken(name: tuple[str, ...]) -> bool:
        return any(name[: len(path)] == path for path in taken)

    def said(name: tuple[str, ...]) -> str:
        return repr("/".join(name) or "(root)")

    for name, leaf in found.items():
        where = f"{what} {said(name)}"
        if is_part_of_taken(name):
            continue
        if not hasattr(leaf, "shape"):
            problems.append(f"{where} is a Python {type(leaf).__name__}; make it an array")
        elif not _is_real(leaf):
            problems.append(f"{where} has dtype {leaf.dtype}, not a floating-point one; cast it")
        elif name not in expected:
            problems.append(f"{where} belongs to no {of}")
        elif leaf.shape != jnp.shape(expected[name]):
            problems.append(f"{where} has shape {leaf.shape}, its {of} {jnp.shape(expected[name])}")
    missing = [name for name in expected if name not in found and not is_part_of_taken(name)]
    problems += [f"the {of} {said(name)} has no {what}" for name in missing]
    return problems


def _is_taken(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def placed_like(tree: Any, like: Any) -> Any:
    """`tree`, its leaves cut as those of `like` at the same paths, as far as types say how.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from ravine.core.fit import placed_like
      >>> with jax.set_mesh(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])):
      ...     params = {"w": jax.device_put(jnp.ones((2, 4)), P("x", None))}
      ...     gradient = jax.device_put(jnp.ones((2, 4)), P(None, "x"))
      ...     print(jax.typeof(placed_like({"w": gradient}, params)["w"]))
      float32[2@x,4]
    """
    if like is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    others, other_structure = jax.tree.flatten(like)
    if all(_mesh(x) is None for x in others):
        return tree
    if structure != other_structure:
        named = {key_names(p): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
        paths = [key_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        others = [named.get(path, x) for path, x in zip(paths, leaves, strict=True)]
    return structure.unflatten(map(_moved, leaves, others))


def _moved(x: Any, like: Any) -> Any:
    if _mesh(x) is None or _mesh(like) is None:
        return x
    wanted = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding.spec == wanted.spec else jax.reshard(x, wanted)


def _mesh(x: Any) -> Any:
    """The mesh in an array's type, or None."""
    if not isinstance(x, jax.Array):
        return None
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty else mesh
