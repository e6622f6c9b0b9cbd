"""Measures of an optimizer's moments: the share that epsilon dominates, and effective ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.arithmetic import wide
from ..core.paths import path_string
from ._layers import Stacked, within_layer

Leaves = Sequence[tuple[Any, jax.Array]]  # with their paths


def eps_shares(
    leaves: Leaves, limit: float, role_of: Mapping[str, str], known: Sequence[str]
) -> dict[str, jax.Array]:
    """``eps_share/role``: the share of elements of second moments whose root is below a limit."""
    if not leaves:
        return {}
    below = dict.fromkeys(known, jnp.zeros([], jnp.float32))
    sizes = dict.fromkeys(known, 0)
    for path, nu in leaves:
        if role := role_of.get(path_string(path)):
            below[role] += jnp.sum(wide(nu) < limit**2).astype(jnp.float32)
            sizes[role] += nu.size
    return {f"eps_share/{role}": below[role] / max(sizes[role], 1) for role in known}


def momentum_ranks(
    leaves: Leaves, layers: Stacked, role_of: Mapping[str, str], known: Sequence[str]
) -> dict[str, jax.Array]:
    """``momentum_rank/role``: the mean over matrices of their effective ranks, 0 without any."""
    if not leaves:
        return {}
    ranks: dict[str, list[jax.Array]] = {role: [] for role in known}
    for path, mu in leaves:
        role = role_of.get(path_string(path))
        axes = within_layer(path, mu, layers)
        if role is None or len(axes) < 2 or not mu.size:
            continue
        outer = tuple(axis for axis in range(mu.ndim) if axis not in axes)
        stacked = wide(jnp.transpose(mu, (*outer, *axes)))
        count = stacked.shape[0] if outer else 1
        ranks[role].append(effective_ranks(stacked.reshape(count, -1, stacked.shape[-1])))
    none = jnp.zeros([], jnp.float32)
    mean = lambda found: jnp.mean(jnp.concatenate(found)).astype(jnp.float32)
    return {
        f"momentum_rank/{role}": mean(found) if found else none for role, found in ranks.items()
    }


def effective_ranks(m_LxMxN: jax.Array) -> jax.Array:
    r""":math:`\lVert M \rVert_F^4 / \lVert M^\top M \rVert_F^2` of every matrix, `[L]`; 0 of zeros."""
    highest = jnp.max(jnp.abs(m_LxMxN), axis=(1, 2), keepdims=True)
    m_LxMxN = m_LxMxN / jnp.where(highest > 0, highest, 1)
    side = "lmn,lmk->lnk" if m_LxMxN.shape[1] >= m_LxMxN.shape[2] else "lmn,lkn->lmk"
    gram = jnp.einsum(side, m_LxMxN, m_LxMxN)
    square = jnp.sum(jnp.square(m_LxMxN), axis=(1, 2))
    fourth = jnp.sum(jnp.square(gram), axis=(1, 2))
    return jnp.square(square) / jnp.where(fourth > 0, fourth, 1)
