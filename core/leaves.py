"""State that is kept per parameter but not shaped like it: its place in the tree.

Flax puts parameters into boxes that carry their shardings (`flax.nnx.Variable` and
`flax.linen.Partitioned`). Arrays of another shape must not inherit those, and NNX replaces the whole
value of a variable. So such state takes the place of the *box* in the tree, not a place inside it.
"""

from collections.abc import Sequence
from typing import Any

import jax


def at_leaves(tree: Any, values: Sequence[Any]) -> Any:
    """A tree like `tree`, with a value for every leaf, or for the box around it."""
    return places(tree).unflatten(values)


def from_leaves(tree: Any, kept: Any) -> list[Any]:
    """The inverse of `at_leaves`: what is kept for every leaf of `tree`, in their order."""
    return places(tree).flatten_up_to(kept)


def places(tree: Any) -> Any:
    """The structure of a tree with one value for every leaf, or for the box around it."""
    return jax.tree.structure(tree, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    # Duck-typed, since Flax need not be installed. `optax.masked` leaves empty boxes behind.
    kind = type(node)
    is_flax = hasattr(kind, "replace_boxed") or hasattr(kind, "get_raw_value")
    return is_flax and len(jax.tree.leaves(node)) == 1
