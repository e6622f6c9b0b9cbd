"""The graft of blocks: the directions of Shampoo with the sizes of another step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..links.graft import norm_ratio
from .blockwise import Tensors


def grafted(
    tensors: Tensors,
    directions: Sequence[jax.Array],
    distrusted: Sequence[jax.Array],
    step: Any,
    steps: Sequence[jax.Array],
    per: str,
) -> tuple[Any, list[jax.Array]]:
    """The leaves of blocks' directions with the size of `step`, a tree, and the blocks' size ratios.

    `steps` are the blocks of `step`, which blocks without a trusted root take. ``per`` is "block",
    "parameter" or "none", which leaves directions unchanged.
    """
    if per == "parameter":
        leaves = (jax.tree.leaves(tree) for tree in (step, tensors.closed(directions)))
        every = tensors.of_leaves(
            [
                norm_ratio(d, x, tuple(range(x.ndim)), keep=False, summed=blocking.leaf_names)
                for d, x, blocking in zip(*leaves, tensors.blockings, strict=True)
            ]
        )
    elif per == "block":
        every = [
            norm_ratio(d, x, tuple(range(f.ndim, x.ndim)), keep=False, summed=tensor.summed)
            for d, x, f, tensor in zip(steps, directions, distrusted, tensors, strict=True)
        ]
    else:
        every = [jnp.ones([], d.dtype) for d in steps]
    blocks, ratios = [], []
    for direction, failed, other, ratio in zip(directions, distrusted, steps, every, strict=True):
        ratios.append(jnp.broadcast_to(ratio, failed.shape).astype(direction.dtype))
        wider = (...,) + (None,) * (direction.ndim - failed.ndim)
        sized = direction * ratios[-1][wider].astype(direction.dtype)
        blocks.append(jnp.where(failed[wider], other.astype(direction.dtype), sized))
    return tensors.closed(blocks), ratios
