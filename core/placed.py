"""Gradients lie on a mesh as the parameters do.

A gradient that `Explicit` axes cut otherwise is resharded before the update, so that neither moments
nor factors are: the state keeps its shardings from step to step, as `jax.lax.scan` and donated buffers
need. Where all axes are `Auto`, types do not say how anything is cut, and the compiler chooses
(`ravine.on_mesh` tells it).
"""

from typing import Any

import jax

from .paths import path_string


def placed_like(tree: Any, like: Any) -> Any:
    """`tree`, its leaves cut as those of `like` at the same paths, as far as types say how.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from ravine.core.placed import placed_like
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
        named = {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
        paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
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
