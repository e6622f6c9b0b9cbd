"""Which blocks' roots Shampoo has refused, read from its state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ...core.paths import key_names
from .inverse_roots import Factor


class RefusedRoot(NamedTuple):
    """A block with roots that failed their certificate, along one axis."""

    piece: int  # of the parameter, if it consists of several matrices of unequal size
    axis: int  # of the block: 0 for rows, 1 for columns
    block: tuple[int, ...]  # index into `[*batch, *counts]`: which matrix, which block of it
    refused: int  # roots so far
    failures: int  # roots since the last good one
    residual: float  # of the last root tried, to be compared with `roots.tolerance`


def root_failures(opt_state: Any) -> dict[str, list[RefusedRoot]]:
    """The blocks with a root that :func:`shampoo` refused, by parameter; empty if all are good.

    A block with roots that keep failing (``roots.patience``) takes the step of the graft. This function
    reads values, so call it outside ``jax.jit``.

    Args:
      opt_state: an optimizer's state with Shampoo at any depth; also that of ``nnx.Optimizer``.

    Returns:
      Paths of parameters and lists of blocks: which, how often, and how far from the certificate.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> params = {"kernel": jnp.ones((4, 6))}
      >>> tx = ravine.shampoo(1e-3, refresh={"every": 1}, roots={"tolerance": 0})  # none
      >>> state = jax.jit(tx.init)(params)
      >>> _, state = jax.jit(tx.update)(params, state, params)
      >>> [(r.axis, r.block, r.refused) for r in ravine.root_failures(state)["kernel"]]
      [(0, (0, 0, 0), 1), (1, (0, 0, 0), 1)]
    """
    is_factor = lambda node: isinstance(node, Factor)
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_factor)
    found: dict[str, list[RefusedRoot]] = {}
    for path, factor in nodes:
        if not is_factor(factor):
            continue
        names = key_names(path)
        parameter = "/".join(names[_start(path) : -2])
        refused, failures, residual = (
            np.asarray(x) for x in (factor.refused, factor.failures, factor.residual)
        )
        for at in np.argwhere(refused > 0):
            block = tuple(map(int, at))
            root = RefusedRoot(
                int(names[-2]),
                int(names[-1]),
                block,
                int(refused[block]),
                int(failures[block]),
                float(residual[block]),
            )
            found.setdefault(parameter, []).append(root)
    return found


def _start(path: Sequence[Any]) -> int:
    """Where the parameter's own path begins, which may have a `factors` too."""
    fields = [getattr(key, "name", None) for key in path]
    if "factors" not in fields:  # in a dictionary
        return key_names(path).index("factors") + 1
    return fields.index("factors") + 1
