"""Where two trees with the same leaves differ in what holds them."""

from typing import Any

import jax

from .paths import key_names


def first_other(found: Any, expected: Any) -> tuple[tuple[str, ...], str, str] | None:
    """The first container of another type: its path, its type and the expected one; None if none is.

    Example:
      >>> from ravine.core.containers import first_other
      >>> first_other({"a": [1.0, 2.0]}, {"a": (3.0, 4.0)})
      (('a',), 'list', 'tuple')
    """
    if type(found) is not type(expected):
        if _is_leaf(found) and _is_leaf(expected):
            return None
        return (), type(found).__name__, type(expected).__name__
    inside = [
        jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node, tree=tree: node is not tree)
        for tree in (found, expected)
    ]
    for (path, one), (_, other) in zip(*inside, strict=False):
        # A leaf is its own only part.
        if path and (below := first_other(one, other)):
            return (*key_names(path), *below[0]), *below[1:]
    return None


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])
