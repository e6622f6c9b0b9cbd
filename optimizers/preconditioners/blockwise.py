"""The one driver for everything that works on blocks: leaf → blocks → step → refresh → leaf.

Shampoo, SOAP and KL-Shampoo differ in the state for an axis of a block, and in what they compute from
it. This file has what they share: one `shard_map` per update, in which every leaf is split into tensors
of blocks; and units, which group blocks of all leaves into batches: `together` for work on every step,
`refreshed` for work on some steps.

A preconditioner's own functions receive batches of blocks `[B, ...]` and their factors, without leaves
or meshes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...core.arithmetic import cast, cast_like, wide_dtype
from ...core.own_norm import OwnNorm, replicated_norms, with_norm
from ...core.paths import paths_of
from ...core.transformation import transformation
from ..matrix.batch.refresh import Refresh
from ..matrix.mesh.exchange import per_shard
from ..matrix.mesh.explicit import on_mixed_meshes
from ..matrix.shape.blocking import Blocking
from ..matrix.shape.blocks import blocks_in_words
from .tensors import Tensors


def _as_wide_as(params: optax.Params | None, updates: optax.Updates) -> optax.Updates:
    """Updates in what the state of these parameters is kept in, float64 or not."""
    if params is None:
        return updates

    def of(update: jax.Array, param: jax.Array) -> jax.Array:
        kept = wide_dtype(param.dtype)
        return update if wide_dtype(update.dtype) == kept else cast(update, kept)

    return jax.tree.map(of, updates, params)


def blockwise(
    name: str,
    blockings: Callable[[Any], list[Blocking]],
    init: Callable[[optax.Params], Any],
    step: Callable[..., tuple[optax.Updates, Any]],
    norm: Callable[..., list[OwnNorm]],
    refresh: Refresh,
    **numbers: Any,
) -> optax.GradientTransformation:
    """The transformation of a step on blocks.

    Args:
      name: the name of the function that makes it.
      blockings: gives the blockings of all leaves of a tree.
      init: makes the initial state.
      step: from updates, state, tensors and numbers, by their names, to updates and state; on a mesh,
        for each device's parts.
      norm: from the same to the norms of all blocks, see `with_norm`.
      refresh: for the explanation, which lists options that differ from the defaults.
      **numbers: hyperparameters, which are arrays if they are injected.
    """

    # Staggered, what is refreshed on a step is decided leaf by leaf.
    tensors = functools.partial(Tensors, stacks=refresh.phases == 1)

    def body(
        updates: optax.Updates, state: Any, found: Sequence[Blocking], **numbers: Any
    ) -> tuple[optax.Updates, Any]:
        return step(updates, state, tensors(updates, found, state), **numbers)

    on_shards = per_shard(body, init, blockings, numbers=numbers)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        found = on_shards(_as_wide_as(params, updates), state)
        return cast_like(found, (updates, state))

    def describe(params: optax.Params) -> dict[str, list[str]]:
        return {
            "how": [f"{blocks}{refresh.words}" for blocks in blocks_in_words(blockings(params))]
        }

    made = transformation(on_mixed_meshes(init), update, describe, name)
    return with_norm(made, name, _norms(blockings, init, norm, numbers))


def _norms(
    blockings: Callable[[Any], list[Blocking]],
    init: Callable[[optax.Params], Any],
    norm: Callable[..., list[OwnNorm]],
    numbers: dict[str, Any],
) -> Callable[[optax.Updates, Any], dict[str, OwnNorm]]:
    """The norms of leaves: those of their blocks, added up over all devices."""

    def body(
        updates: optax.Updates, state: Any, found: Sequence[Blocking], **numbers: Any
    ) -> list[OwnNorm]:
        tensors = Tensors(updates, found, stacks=False)
        leaves = tensors.by_leaf(norm(updates, state, tensors, **numbers))

        def summed(blocks: Sequence[jax.Array], cut: Blocking) -> jax.Array:
            return jax.lax.psum(functools.reduce(jnp.add, map(jnp.sum, blocks)), cut.block_names)

        return [
            OwnNorm(*(summed(blocks, cut) for blocks in zip(*each, strict=True)))
            for each, cut in zip(leaves, found, strict=True)
        ]

    on_shards = per_shard(body, init, blockings, replicated_norms, numbers)

    def norms(updates: optax.Updates, state: Any) -> dict[str, OwnNorm]:
        return dict(zip(paths_of(updates), on_shards(updates, state), strict=True))

    return norms
