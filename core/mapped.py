"""Mesh axes that `jax.vmap` maps over: what it maps over may be sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

try:
    # What `jax.shard_map` asks; there is no public name for it (JAX 0.10).
    from jax._src.core import get_axis_env as _axis_environment
except ImportError:  # then JAX refuses what is mapped over a mesh axis
    _axis_environment = object


def mapped_axes() -> frozenset[str]:
    """Names of the mesh axes that shard what an enclosing `jax.vmap` maps over."""
    return explicit_mapped_axes() | spmd_mapped_axes()


def explicit_mapped_axes() -> frozenset[str]:
    """Those that are `Explicit`."""
    return getattr(_axis_environment(), "explicit_mesh_axis_names", frozenset())


def spmd_mapped_axes() -> frozenset[str]:
    """Those that are `Auto`, and named by ``spmd_axis_name``."""
    return getattr(_axis_environment(), "spmd_axis_names", frozenset())


def mapped_as_arguments(tree: Any) -> Any:
    """`tree`, whose leaves `jax.vmap` will shard as it does those that depend on its arguments.

    The others have no mesh in their types under ``jax.jit``, and so a count of steps would be mapped
    without being sharded, which `jax.vmap` refuses at the next step.
    """
    if not explicit_mapped_axes():
        return tree
    bare = lambda x: jax.typeof(x).sharding.mesh.empty
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()) if bare(x) else x, tree)


def cond(due: jax.Array, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`, also where `jax.vmap` maps over an axis that a mesh shards.

    A mapped conditional computes both sides anyway, and JAX (0.10) selects one without regard to how it
    is sharded.
    """
    if not mapped_axes():
        return jax.lax.cond(due, yes, no, *operands)
    return jax.tree.map(lambda a, b: jnp.where(due, a, b), yes(*operands), no(*operands))
