"""What the rules decide about parameters, given only their shapes."""

import jax
import jax.numpy as jnp
from ravine.optimizers.roles import assign_roles, layouts, path_string


def shapes(tree):
    is_shape = lambda leaf: isinstance(leaf, tuple)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def decided(params, rules) -> dict[str, tuple]:
    """A dictionary from each path to (role, pieces)."""
    roles = jax.tree_util.tree_leaves_with_path(assign_roles(params, rules))
    found = jax.tree.leaves(layouts(params, rules), is_leaf=lambda leaf: leaf is None)
    return {
        path_string(path): (role, leaf_layout.pieces if leaf_layout else None)
        for (path, role), leaf_layout in zip(roles, found, strict=True)
    }
