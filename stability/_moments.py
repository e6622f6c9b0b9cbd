"""The moments in the state of a direction, found by name: Adam's in Ravine, Optax or elsewhere."""

from typing import Any

import jax


def _holders(state: Any) -> list[Any]:
    def is_holder(node: Any) -> bool:
        return hasattr(node, "_fields") and {"nu", "count"} <= set(node._fields)

    return [node for node in jax.tree.leaves(state, is_leaf=is_holder) if is_holder(node)]


def moment_state(state: Any, like: Any, what: str) -> Any:
    """The one node in `state` with fields ``nu``, shaped like the parameters, and ``count``."""
    found = _holders(state)
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    if len(found) != 1 or shapes(found[0].nu) != shapes(like):
        raise ValueError(
            f"{what} needs a direction whose state has one second moment 'nu' shaped like the "
            f"parameters, and a 'count'; found {len(found)}. scale_by_adam is one."
        )
    return found[0]


def map_moments(function: Any, state: Any) -> Any:
    """`state` with ``function(name, tree)`` in the place of every ``mu`` and ``nu``."""

    def replaced(node: Any) -> Any:
        if not hasattr(node, "_fields"):
            return node
        names = {"mu", "nu"}.intersection(node._fields)
        return node._replace(**{name: function(name, getattr(node, name)) for name in names})

    is_holder = lambda node: bool({"mu", "nu"}.intersection(getattr(node, "_fields", ())))
    return jax.tree.map(replaced, state, is_leaf=is_holder)


def moment_leaves(state: Any, name: str) -> list[tuple[Any, jax.Array]]:
    """The leaves of all moments of that name, each with its path within the moment."""
    is_holder = lambda node: name in getattr(node, "_fields", ())
    holders = [n for n in jax.tree.leaves(state, is_leaf=is_holder) if is_holder(n)]
    return [
        leaf
        for holder in holders
        for leaf in jax.tree_util.tree_leaves_with_path(getattr(holder, name))
    ]
