"""Small leaves that are alike, stacked: one leaf with a first axis.

Every array that enters a batch, or leaves one, is a kernel to compile. Stacked once per update, leaves
enter and leave together, and a model of many small ones compiles in little more time than one of a few.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..matrix.batch.batches import starts_of, unjoin
from ..matrix.shape.blocking import Blocking, Tensor

SMALL = 2**14
"""The most elements of a leaf that is stacked. Its state is copied, which costs little while it fits a
cache; the state of larger leaves is updated in place. Measured on a CPU."""
STACKED = 2**20
"""The most elements of a stack."""


class Stack:
    """Leaves that are cut into blocks the same way, as one; or one leaf as it is."""

    def __init__(self, cut: Blocking, members: Sequence[int]):
        """`members`: where the leaves are among all leaves."""
        self.cut, self.members = cut, members
        self._is_one, self._starts = len(members) == 1, ()

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the stack, with one batch axis if there are several leaves."""
        each, n = self.cut.tensors, len(self.members)
        return each if self._is_one else [tensor.repeated(n) for tensor in each]

    def to_blocks(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The blocks of each tensor."""
        if self._is_one:
            return self.cut.to_blocks(leaves[0])
        cut = jax.vmap(self.cut.to_blocks)(jnp.stack(leaves))
        return [_joint(x, 1 + len(counts)) for x, counts in zip(cut, self._counts, strict=True)]

    def from_blocks(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves of these blocks."""
        if self._is_one:
            return [self.cut.from_blocks(blocks)]
        each = [self._apart(x, counts) for x, counts in zip(blocks, self._counts, strict=True)]
        leaves = jax.vmap(lambda *blocks: self.cut.from_blocks(blocks))(*each)
        return self._parts([leaves])[0]

    def joined(self, trees: Sequence[Any]) -> Any:
        """Trees of arrays `[*batch, *counts, ...]`, one for each leaf, as one tree of arrays."""
        if self._is_one:
            return trees[0]
        axes = len(self._counts[0])
        return jax.tree.map(lambda *parts: _joint(jnp.concatenate(parts), axes), *trees)

    def split(self, trees: Sequence[Any]) -> list[tuple[Any, ...]]:
        """For each leaf a tuple of trees, from a tree for each tensor; the inverse of `joined`."""
        if self._is_one:
            return [tuple(trees)]
        cut = zip(trees, self._counts, strict=True)
        arrays = [jax.tree.map(lambda x, n=n: self._apart(x, n), tree) for tree, n in cut]
        flat, structure = jax.tree.flatten(tuple(arrays))
        return [structure.unflatten(parts) for parts in zip(*self._parts(flat), strict=True)]

    def numbers(
        self, function: Callable[..., jax.Array], *blocks: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """What a function finds for each leaf, one number for its blocks, for each tensor's blocks."""

        def of(*blocks: Sequence[jax.Array]) -> list[jax.Array]:
            number = function(*blocks)
            return [jnp.broadcast_to(number, counts) for counts in self._counts]

        if self._is_one:
            return of(*blocks)
        each = [
            [self._apart(x, counts) for x, counts in zip(given, self._counts, strict=True)]
            for given in blocks
        ]
        return [_joint(x, x.ndim) for x in jax.vmap(of)(*each)]

    @functools.cached_property
    def _counts(self) -> list[tuple[int, ...]]:
        """`[*batch, *counts]` of each tensor of a leaf."""
        return [tensor.counts for tensor in self.cut.tensors]

    def _apart(self, x: jax.Array, counts: Sequence[int]) -> jax.Array:
        return x.reshape(len(self.members), *counts, *x.shape[1:])

    def _parts(self, stacks: Sequence[jax.Array]) -> list[list[jax.Array]]:
        lengths = [1] * len(self.members)
        self._starts = self._starts or tuple(starts_of(lengths, stacks))
        cut = unjoin(stacks, lengths, self._starts)
        return [[jax.lax.squeeze(x, (0,)) for x in parts] for parts in cut]


def _joint(stack: jax.Array, axes: int) -> jax.Array:
    """The array, with one axis in the place of so many."""
    return stack.reshape(math.prod(stack.shape[:axes]), *stack.shape[axes:])


def stacks_of(
    blockings: Sequence[Blocking], leaves: Sequence[Any], dtypes: Sequence[Hashable]
) -> list[Stack]:
    """Stacks of all leaves: of small ones that are cut alike and stay where they are on a mesh.

    Args:
      blockings: those of all leaves.
      leaves: the leaves, or what has their shapes.
      dtypes: something that stacked leaves have in common.
    """
    found: dict[Hashable, list[list[int]]] = {}
    for at, (cut, leaf, dtype) in enumerate(zip(blockings, leaves, dtypes, strict=True)):
        where = cut.placement
        if leaf.size > SMALL or where.moves or where.summed:
            found[at] = [[at]]
            continue
        own = (leaf.shape, cut.layout, cut.grids, cut.factored, where.inside, dtype)
        groups = found.setdefault(own, [[]])
        if (len(groups[-1]) + 1) * leaf.size > STACKED:
            groups.append([])
        groups[-1].append(at)
    return [Stack(blockings[each[0]], each) for groups in found.values() for each in groups]
