"""Paths of parameters as text."""

from collections.abc import Iterable
from typing import Any

import jax


def path_string(path: Iterable[Any]) -> str:
    """A key path as ``layers/attention/query/kernel``; Flax's trailing ``.value`` is left out.

    Example:
      >>> import jax
      >>> from ravine.optimizers.roles import path_string
      >>> [path_string(path) for path, _ in jax.tree.leaves_with_path({"a": {"b": [1, 2]}})]
      ['a/b/0', 'a/b/1']
    """
    return "/".join(key_names(path))


def key_names(path: Iterable[Any]) -> tuple[str, ...]:
    """The names in a key path, without Flax's trailing ``.value``."""
    keys = tuple(path)
    # An attribute of a variable or a box; an entry `["value"]` of a dictionary is a name.
    if len(keys) > 1 and getattr(keys[-1], "name", None) in ("value", "raw_value"):
        keys = keys[:-1]
    return tuple(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys)


def paths_of(tree: Any) -> list[str]:
    """The path of every leaf, in the order of the leaves; no two are alike.

    Raises:
      ValueError: for two leaves with one path, as of a key that has a slash in it.

    Example:
      >>> from ravine.core.paths import paths_of
      >>> paths_of({"a": {"b": 1.0}, "c": 2.0})
      ['a/b', 'c']
    """
    first: dict[str, Any] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        name = path_string(path)
        if name in first:
            both = " and ".join(map(jax.tree_util.keystr, (first[name], path)))
            raise ValueError(
                f"the parameters {both} have the same path, {name!r}, by which they are told apart; "
                "rename one of them."
            )
        first[name] = path
    return list(first)
