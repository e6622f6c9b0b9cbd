"""The tensors of all leaves, cut into blocks, and what is kept for them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ...core.leaves import places
from ..matrix.shape.blocking import Blocking, Tensor
from .stacks import Stack, stacks_of


class Tensors(list[Tensor]):
    """The tensors of all leaves, one after the other: everything here is a list along them.

    Small leaves that are alike are one, see `Stack`.
    """

    def __init__(self, like: Any, blockings: Sequence[Blocking], state: Any = (), *, stacks: bool):
        """The tensors of a tree.

        Args:
          like: a tree like the parameters.
          blockings: those of its leaves.
          state: trees with something for each leaf, and arrays that belong to none; leaves are only
            stacked if theirs have the same dtypes.
          stacks: whether leaves may be stacked.
        """
        self._like, self._places, leaves = like, places(like), jax.tree.leaves(like)
        kept = [tree for tree in state if jax.tree.leaves(tree) and not hasattr(tree, "dtype")]
        by_leaf = zip(leaves, *map(self._places.flatten_up_to, kept), strict=True)
        dtypes = [tuple(x.dtype for x in jax.tree.leaves(each)) for each in by_leaf]
        if stacks:
            self._stacks = stacks_of(blockings, leaves, dtypes)
        else:
            self._stacks = [Stack(cut, [at]) for at, cut in enumerate(blockings)]
        super().__init__(tensor for stack in self._stacks for tensor in stack.tensors)

    def opened(self, tree: Any) -> list[jax.Array]:
        """The blocks of a tree of leaves."""
        leaves = jax.tree.leaves(tree)
        cut = [stack.to_blocks([leaves[at] for at in stack.members]) for stack in self._stacks]
        return [blocks for each in cut for blocks in each]

    def closed(self, blocks: Sequence[jax.Array]) -> Any:
        """The tree of leaves that consist of these blocks."""
        leaves = self._in_order(lambda stack, each: stack.from_blocks(each), blocks)
        return jax.tree.unflatten(jax.tree.structure(self._like), leaves)

    def kept(self, *trees: Any) -> list[list[Any]]:
        """The state of each tensor, from each tree with a tuple for every leaf."""
        by_leaf = list(zip(*map(self._places.flatten_up_to, trees), strict=True))
        found = [stack.joined([by_leaf[at] for at in stack.members]) for stack in self._stacks]
        return [[each for of in found for each in of[at]] for at in range(len(trees))]

    def to_keep(self, *values: Sequence[Any]) -> list[Any]:
        """The inverse of `kept`."""
        together = list(zip(*values, strict=True))
        by_leaf = self._in_order(lambda stack, each: stack.split(each), together)
        return [
            self._places.unflatten([tuple(each[at] for each in leaf) for leaf in by_leaf])
            for at in range(len(values))
        ]

    def by_leaf(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """A tuple for every leaf, if none are stacked."""
        return self._in_order(lambda _, each: [each], values)

    def numbers(
        self, function: Callable[..., jax.Array], *blocks: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """The number that a function finds for a leaf, `[*batch, *counts]` for each tensor.

        Args:
          function: of the mesh axes that share a leaf's blocks or cut through them, and for each of
            `blocks` the list of the leaf's own, one for each of its tensors.
          *blocks: those of all tensors.
        """
        return [
            number
            for stack, *each in zip(self._stacks, *map(self._by_stack, blocks), strict=True)
            for number in stack.numbers(functools.partial(function, stack.cut.block_names), *each)
        ]

    def _by_stack(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        left = iter(values)
        return [tuple(next(left) for _ in stack.cut.grids) for stack in self._stacks]

    def _in_order(
        self, found: Callable[[Stack, Any], Sequence[Any]], values: Sequence[Any]
    ) -> list[Any]:
        """What is found for the leaves of each stack from its values, in the order of all leaves."""
        by_leaf: dict[int, Any] = {}
        for stack, each in zip(self._stacks, self._by_stack(values), strict=True):
            by_leaf.update(zip(stack.members, found(stack, each), strict=True))
        return [by_leaf[at] for at in range(len(by_leaf))]
