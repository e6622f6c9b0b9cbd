"""The norm in which Muon sees a gradient, from an eigendecomposition of its momentum."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...core.arithmetic import cast, wide_dtype
from ...core.own_norm import OwnNorm, replicated_norms
from ...core.paths import path_string
from ..matrix.algebra.lapack import eigh
from ..matrix.batch.batches import map_matrices
from ..matrix.mesh.exchange import per_shard
from ..matrix.mesh.placement import Names
from ..matrix.shape.matrices import Axes, Matrices, matrices_of


def polar_norms(
    grads: optax.Updates, momentum: optax.Updates, axes: Axes, max_elements: int | None = None
) -> dict[str, OwnNorm]:
    r"""Norms with :math:`P = (M M^\top)^{-1/2}`, or :math:`(M^\top M)^{-1/2}` from the right for tall M.

    The product of P and the momentum M is the polar factor of M, so this is Muon's own norm. Squares of
    singular values count at least as a rounding error of the largest one.
    """

    def body(grads: Any, momentum: Any, found: Sequence[Matrices]) -> list[OwnNorm]:
        pieces: list[jax.Array] = []
        names: list[Sequence[Names]] = []
        counts = []
        leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(momentum), strict=True)
        for each, pair in zip(found, leaves, strict=True):
            dtype = wide_dtype(*(x.dtype for x in pair))
            opened = [each.opened(cast(x, dtype)) for x in pair]
            batch, *sides = each.names
            counts.append(len(opened[0]))
            for both in zip(*opened, strict=True):
                lengths = [
                    n * each.placement.parts(cut)
                    for n, cut in zip(both[0].shape[1:], sides, strict=True)
                ]
                is_wide = lengths[0] <= lengths[1]
                # Alternating along the long side, so that a mesh may cut both there at once.
                flat = [x if is_wide else jnp.swapaxes(x, 1, 2) for x in both]
                pieces.append(jnp.stack(flat, axis=-1).reshape(*flat[0].shape[:2], -1))
                names.append((batch, *(sides if is_wide else reversed(sides))))
        sizes = next((each.sizes for each in found if each.sizes), {})
        done = iter(map_matrices(_polar_form, pieces, max_elements, names=names, sizes=sizes))
        norms = []
        for each, count in zip(found, counts, strict=True):
            cut = tuple(name for axis in each.placement.inside for name in axis)
            both = [jnp.sum(next(done).reshape(-1, 2), axis=0) for _ in range(count)]
            norms.append(OwnNorm(*jax.lax.psum(functools.reduce(jnp.add, both), cut)))
        return norms

    cuts = functools.partial(matrices_of, axes=axes)
    found = per_shard(body, lambda updates: updates, cuts, replicated_norms)(grads, momentum)
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    return dict(zip(paths, found, strict=True))


def _polar_form(pairs_KxMx2N: jax.Array) -> jax.Array:
    """Parts of the form and of the trace, alternating, from gradients and momenta that do so too."""
    grads, momentum = jnp.moveaxis(pairs_KxMx2N.reshape(*pairs_KxMx2N.shape[:2], -1, 2), -1, 0)
    gram = jnp.matmul(momentum, jnp.swapaxes(momentum, 1, 2), precision="highest")
    values, vectors = eigh(gram)
    least = values[:, -1:] * (gram.shape[-1] * float(jnp.finfo(gram.dtype).eps))
    values = jnp.maximum(values, least)
    weights = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)[..., None]
    turned = jnp.matmul(jnp.swapaxes(vectors, 1, 2), grads, precision="highest")
    form = weights * jnp.square(turned)
    parts = jnp.stack([form, jnp.broadcast_to(weights, form.shape)], axis=-1)
    return parts.reshape(pairs_KxMx2N.shape)
