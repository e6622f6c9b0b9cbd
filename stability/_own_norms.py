r"""The quadratic norm in which a matrix optimizer sees a gradient, :math:`\langle G, P[G] \rangle`.

Found in its state, as it was before the gradient: so the norm knows nothing of the gradient, and what is
estimated in it is unbiased. P is symmetric and positive; its trace says how large it is by itself.

* Shampoo and KL-Shampoo: a product of the roots of a block, one for each axis.
* SOAP: :math:`1 / \sqrt{v}` in the eigenbasis of a block.
* Muon: :math:`(M M^\top)^{-1/2}` of the momentum, which times the momentum is Muon's step.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.arithmetic import wide
from ..core.paths import path_string
from ..core.transformation import states_of
from ..optimizers.links.momentum import ScaleByEmaMomentumState

_HIGHEST = jax.lax.Precision.HIGHEST


class OwnNorm(NamedTuple):
    """Of one leaf."""

    square: jax.Array  # <G, P[G]>
    trace: jax.Array  # of P, over as many coordinates as the leaf has elements


def own_norms(grads: Any, roles: Sequence[str], opt_state: Any) -> dict[str, OwnNorm]:
    """By path, of the leaves for which the state holds a norm of matrices.

    Leaves whose blocks are not cut from their last axes, or whose roots are packed, are left out.

    Args:
      grads: a tree of gradients.
      roles: of its leaves.
      opt_state: the optimizer's state.
    """
    leaves = {
        path_string(path): (jnp.asarray(wide(leaf), jnp.float32), role)
        for (path, leaf), role in zip(
            jax.tree_util.tree_leaves_with_path(grads), roles, strict=True
        )
    }
    found: dict[str, OwnNorm] = {}
    for node in _nodes(opt_state, "factors"):
        for path, (axes, *more) in _kept(node.factors):
            if path in leaves and not more:
                roots = [axis if axis is None else axis.root for axis in axes]
                _put(found, path, _of_roots(leaves[path][0], roots))
    for node in _nodes(opt_state, "bases"):
        second = dict(_kept(node.nu))
        for path, (axes, *more) in _kept(node.bases):
            if path in leaves and not more:
                vectors = [axis if axis is None else axis.vectors for axis in axes]
                _put(found, path, _of_basis(leaves[path][0], vectors, second[path][0]))
    for node in states_of(ScaleByEmaMomentumState, opt_state):
        for path, mu in jax.tree_util.tree_leaves_with_path(node.mu):
            leaf, role = leaves.get(path_string(path), (None, ""))
            if leaf is not None and role == "matrix" and mu.ndim >= 2:
                found[path_string(path)] = _of_momentum(leaf, jnp.asarray(wide(mu), jnp.float32))
    return found


def _put(found: dict[str, OwnNorm], path: str, norm: OwnNorm | None) -> None:
    if norm is not None:
        found[path] = norm


def _nodes(state: Any, name: str) -> list[Any]:
    holds = lambda node: name in getattr(node, "_fields", ())
    return [node for node in jax.tree.leaves(state, is_leaf=holds) if holds(node)]


def _kept(tree: Any) -> list[tuple[str, Any]]:
    """What is kept for each leaf, a tuple along its tensors."""
    is_tensors = lambda node: type(node) is tuple
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_tensors)
    return [(path_string(path), leaf) for path, leaf in leaves if is_tensors(leaf)]


def _blocks(leaf: jax.Array, matrices: Sequence[Any]) -> tuple[jax.Array, int] | None:
    """`[*batch, *counts, *sizes]` as the factors have them, and how many axes come before sizes.

    None, if the factors are of other blocks.
    """
    order = len(matrices)
    lead = next((x.shape[:-2] for x in matrices if x is not None), None)
    if lead is None or leaf.ndim < order:
        return None
    batch, counts = lead[:-order], lead[-order:]
    lengths = leaf.shape[leaf.ndim - order :]
    if math.prod(batch) * math.prod(lengths) != leaf.size:
        return None
    leaf = leaf.reshape(*batch, *lengths)
    sizes = [
        -(-length // count) if matrix is None else matrix.shape[-1]
        for length, count, matrix in zip(lengths, counts, matrices, strict=True)
    ]
    if [-(-n // size) for n, size in zip(lengths, sizes, strict=True)] != list(counts):
        return None
    padding = [n * size - length for n, size, length in zip(counts, sizes, lengths, strict=True)]
    padded = jnp.pad(leaf, [(0, 0)] * len(batch) + [(0, more) for more in padding])
    cut = padded.reshape(*batch, *(x for pair in zip(counts, sizes, strict=True) for x in pair))
    first = len(batch)
    inner = [first + 2 * axis for axis in range(order)]
    moved = (*range(first), *inner, *(axis + 1 for axis in inner))
    return jnp.transpose(cut, moved), len(lead)


def _turned(blocks: jax.Array, matrices: Sequence[Any], lead: int) -> jax.Array:
    """Blocks times the transposes of matrices, along every axis that has one."""
    for axis, matrix in enumerate(matrices):
        if matrix is None:
            continue
        rows = jnp.moveaxis(blocks, lead + axis, -1)
        flat = rows.reshape(*rows.shape[:lead], -1, rows.shape[-1])
        turned = jnp.matmul(flat, jnp.asarray(wide(matrix), jnp.float32), precision=_HIGHEST)
        blocks = jnp.moveaxis(turned.reshape(rows.shape), -1, lead + axis)
    return blocks


def _of_roots(leaf: jax.Array, roots: Sequence[Any]) -> OwnNorm | None:
    cut = _blocks(leaf, roots)
    if cut is None:
        return None
    blocks, lead = cut
    trace = jnp.ones(blocks.shape[:lead], jnp.float32)
    for axis, root in enumerate(roots):
        size = blocks.shape[lead + axis]
        of_root = None if root is None else jnp.trace(wide(root), axis1=-2, axis2=-1)
        trace *= size if of_root is None else of_root.astype(jnp.float32)
    return OwnNorm(jnp.sum(blocks * _turned(blocks, roots, lead)), jnp.sum(trace))


def _of_basis(leaf: jax.Array, vectors: Sequence[Any], nu: jax.Array) -> OwnNorm | None:
    cut = _blocks(leaf, vectors)
    if cut is None or cut[0].shape != nu.shape:
        return None
    nu = jnp.asarray(wide(nu), jnp.float32)
    scale = jnp.where(nu > 0, jax.lax.rsqrt(jnp.where(nu > 0, nu, 1)), 0)
    return OwnNorm(jnp.sum(scale * jnp.square(_turned(cut[0], vectors, cut[1]))), jnp.sum(scale))


def _of_momentum(leaf: jax.Array, mu: jax.Array) -> OwnNorm:
    if mu.shape[-2] > mu.shape[-1]:
        leaf, mu = jnp.swapaxes(leaf, -2, -1), jnp.swapaxes(mu, -2, -1)
    gram = jnp.matmul(mu, jnp.swapaxes(mu, -2, -1), precision=_HIGHEST)
    values, vectors = jnp.linalg.eigh(gram)
    least = jnp.max(values, axis=-1, keepdims=True) * (gram.shape[-1] * jnp.finfo(jnp.float32).eps)
    values = jnp.maximum(values, least)
    scale = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)
    turned = jnp.matmul(jnp.swapaxes(vectors, -2, -1), leaf, precision=_HIGHEST)
    along = jnp.sum(jnp.square(turned), axis=-1)
    return OwnNorm(jnp.sum(scale * along), math.prod(mu.shape[-1:]) * jnp.sum(scale))
