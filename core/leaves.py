"""What is kept per parameter but not shaped like it: where it stands in a tree of state.

Flax puts parameters into boxes that know how they are sharded (`flax.nnx.Variable` and
`flax.linen.Partitioned`). What has another shape must not inherit that, and NNX replaces whatever a
variable holds as a whole. So it stands where the *box* stands in the tree of parameters, not inside it.
"""

from collections.abc import Sequence
from typing import Any

import jax


def at_leaves(tree: Any, values: Sequence[Any]) -> Any:
    """A tree like `tree`, with a value for every leaf, or for the box around it."""
    return jax.tree.unflatten(_places(tree), values)


def from_leaves(tree: Any, kept: Any) -> list[Any]:
    """The inverse of `at_leaves`: what is kept for every leaf of `tree`, in their order."""
    return _places(tree).flatten_up_to(kept)


def _places(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    # By what it can do: Flax need not be installed. `optax.masked` leaves empty boxes behind.
    kind = type(node)
    is_flax = hasattr(kind, "replace_boxed") or hasattr(kind, "get_raw_value")
    return is_flax and len(jax.tree.leaves(node)) == 1
