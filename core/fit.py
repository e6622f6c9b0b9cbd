"""Gradients have the tree and the shapes of the parameters: a gradient that broadcasts is a mistake.

Checked once for all transformations, where they are constructed (``core/transformation.py``),
while an update is traced: it costs nothing at run time.
"""

import functools
import types
from typing import Any, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import optax

from .paths import path_string

MOST_SHOWN = 4


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


def _named(tree: Any) -> dict[str, Any]:
    is_taken = lambda node: isinstance(node, optax.MaskedNode)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_taken)
    return {path_string(path): leaf for path, leaf in leaves}


def _problems(what: str, tree: Any, like: Any, of: str) -> list[str]:
    found, problems = _named(tree), []
    expected = found if like is None else _named(like)
    taken = [name for tree in (found, expected) for name, leaf in tree.items() if _is_taken(leaf)]

    def is_part_of_taken(name: str) -> bool:
        return any(not path or name == path or name.startswith(f"{path}/") for path in taken)

    for name, leaf in found.items():
        where = f"{what} {name or '(root)'!r}"
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
    problems += [f"the {of} {name or '(root)'!r} has no {what}" for name in missing]
    return problems


def _is_taken(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
