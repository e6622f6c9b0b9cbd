"""Norms and root mean squares of a tree by role, as telemetry and monitors report them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .arithmetic import wide

NO_METRICS: Any = 0.0
"""Stands in for metrics while no parameter is known: one leaf, a prefix of any tree of metrics."""


def total_norm(norms: Sequence[jax.Array]) -> jax.Array:
    """The norm of all together."""
    return jnp.sqrt(sum((jnp.square(norm) for norm in norms), start=jnp.zeros([], jnp.float32)))


def sizes_by_role(what: str, tree: Any, roles: Any, known: Sequence[str]) -> dict[str, jax.Array]:
    """``what_norm/role`` and ``what_rms/role``, float32, for every known role; 0 where none has it.

    Args:
      what: the start of the names, such as ``gradient``.
      tree: arrays.
      roles: a tree of the same structure with the role of each leaf.
      known: all roles.
    """
    squares = dict.fromkeys(known, jnp.zeros([], jnp.float32))
    sizes = dict.fromkeys(known, 0)
    for leaf, role in zip(jax.tree.leaves(tree), jax.tree.leaves(roles), strict=True):
        squares[role] += jnp.sum(jnp.square(wide(leaf))).astype(jnp.float32)
        sizes[role] += leaf.size
    found = {}
    for role in known:
        norm = jnp.sqrt(squares[role])
        found[f"{what}_norm/{role}"] = norm
        found[f"{what}_rms/{role}"] = norm / max(sizes[role], 1) ** 0.5
    return found
