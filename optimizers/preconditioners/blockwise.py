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
from ...core.leaves import places
from ...core.own_norm import OwnNorm, replicated_norms, with_norm
from ...core.paths import paths_of
from ...core.transformation import transformation
from ..matrix.batch.refresh import Refresh
from ..matrix.mesh.exchange import gathered, per_shard
from ..matrix.mesh.explicit import on_mixed_meshes
from ..matrix.shape.blocking import Blocking, Tensor
from ..matrix.shape.blocks import blocks_in_words


class Tensors(list[Tensor]):
    """The tensors of all leaves, one after the other: everything here is a list along them."""

    def __init__(self, like: Any, blockings: Sequence[Blocking]):
        super().__init__(tensor for blocking in blockings for tensor in blocking.tensors)
        self._like, self.blockings, self._places = like, blockings, places(like)

    def opened(self, tree: Any) -> list[jax.Array]:
        """The blocks of a tree of leaves."""
        return self.opened_together(tree)[0]

    def opened_together(self, *trees: Any) -> list[list[jax.Array]]:
        """The blocks of each tree; a leaf of all trees takes one exchange."""
        alike = zip(self.blockings, *map(jax.tree.leaves, trees), strict=True)
        cut = [blocking.to_blocks(leaves) for blocking, *leaves in alike]
        by_tree = zip(*cut, strict=True) if cut else [()] * len(trees)
        return [[blocks for leaf in leaves for blocks in leaf] for leaves in by_tree]

    def closed(self, blocks: Sequence[jax.Array]) -> Any:
        """The tree of leaves that consist of these blocks."""
        cut = zip(self.blockings, self.by_leaf(blocks), strict=True)
        leaves = [blocking.from_blocks(each) for blocking, each in cut]
        return jax.tree.unflatten(jax.tree.structure(self._like), leaves)

    def by_leaf(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """A tuple for every leaf."""
        left = iter(values)
        return [tuple(next(left) for _ in blocking.grids) for blocking in self.blockings]

    def of_leaves(self, values: Sequence[Any]) -> list[Any]:
        """Values given per leaf, repeated for each of its tensors."""
        leaves = zip(values, self.blockings, strict=True)
        return [value for value, blocking in leaves for _ in blocking.grids]

    def kept(self, *trees: Any) -> list[list[Any]]:
        """The state of each tensor, from each tree with a tuple for every leaf."""
        flatten = self._places.flatten_up_to
        return [[each for leaf in flatten(tree) for each in leaf] for tree in trees]

    def to_keep(self, *values: Sequence[Any]) -> list[Any]:
        """The inverse of `kept`."""
        return [self._places.unflatten(self.by_leaf(each)) for each in values]

    def zero_unless(self, usable: Sequence[jax.Array], tree: Any) -> Any:
        """The leaves of a tree, zero in blocks that are not usable; flags are `[*batch, *counts]`."""
        by_leaf = self.by_leaf(usable)
        sent = [
            at for at, cut in enumerate(self.blockings) if cut.placement.moves and cut.takes_flags
        ]
        every: dict[int, jax.Array] = {}
        if sent:
            whole = gathered(
                [by_leaf[at][0] for at in sent],
                [self.blockings[at].count_names[0] for at in sent],
                self.blockings[sent[0]].placement.sizes,
            )
            every = dict(zip(sent, whole, strict=True))

        def kept(at: int, leaf: jax.Array) -> jax.Array:
            cut = self.blockings[at]
            if at in every:
                return jnp.where(cut.at_elements(every[at], leaf), leaf, 0)
            sizes = [grid.sizes for grid in cut.grids]
            wide = [
                jnp.broadcast_to(x[(..., *(None,) * len(size))], (*x.shape, *size))
                for x, size in zip(by_leaf[at], sizes, strict=True)
            ]
            return jnp.where(cut.from_blocks(wide), leaf, 0)

        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(kept, range(len(leaves)), leaves))


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

    def body(
        updates: optax.Updates, state: Any, found: Sequence[Blocking], **numbers: Any
    ) -> tuple[optax.Updates, Any]:
        return step(updates, state, Tensors(updates, found), **numbers)

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
        tensors = Tensors(updates, found)
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
