r"""Quadratic forms of blocks: :math:`\langle G, P[G] \rangle` and the trace of P, block by block.

The trace is taken over the coordinates of the leaf, without the padding of its blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...core.arithmetic import wide
from ...core.own_norm import OwnNorm
from ..matrix.algebra.kronecker import rotate
from ..matrix.batch.together import Unit, together
from .tensors import Tensors

Insides = Sequence[jax.Array | None]
"""By axis, how much of it is not padding, `[B]`; None for all of it."""


def forms(
    tensors: Tensors,
    gradients: Sequence[jax.Array],
    kinds: Sequence[Any],
    sources: Sequence[Any],
    form: Callable[[Any, jax.Array, Any, Insides], OwnNorm],
    *,
    growth: int = 1,
    max_elements: int | None = None,
) -> list[OwnNorm]:
    """The forms of all blocks, `[*batch, *counts]`.

    Args:
      tensors: those of all leaves; what follows are lists along them.
      gradients: blocks.
      kinds: as for units.
      sources: what P is made of, trees of arrays `[*batch, *counts, ...]`.
      form: of blocks `[B, ...]`: maps (kind, blocks, source, insides) to forms `[B]`.
      growth: as for units.
      max_elements: as for `together`.
    """
    units = [
        Unit(
            kind,
            (blocks, source, tensor.inside),
            OwnNorm(*(jnp.zeros(tensor.counts, wide(blocks).dtype) for _ in range(2))),
            tensor.spread,
            growth=growth,
        )
        for tensor, blocks, kind, source in zip(tensors, gradients, kinds, sources, strict=True)
    ]

    def found(kind: Any, _: OwnNorm, source: Any) -> OwnNorm:
        blocks, *rest = source
        return OwnNorm(*(x.astype(wide(blocks).dtype) for x in form(kind, wide(blocks), *rest)))

    return together(units, found, max_elements)


def of_factors(blocks: jax.Array, factors: Sequence[jax.Array | None], insides: Insides) -> OwnNorm:
    """With P the Kronecker product of symmetric factors, None for the identity."""
    trace = jnp.ones(blocks.shape[:1], blocks.dtype)
    for size, factor, inside in zip(blocks.shape[1:], factors, insides, strict=True):
        ones = jnp.ones((blocks.shape[0], size), blocks.dtype)
        diagonal = ones if factor is None else jnp.diagonal(factor, axis1=1, axis2=2)
        trace *= jnp.sum(_kept(diagonal, inside), axis=1)
    return OwnNorm(_sum(blocks * rotate(blocks, factors)), trace)


def in_basis(
    blocks: jax.Array,
    vectors: Sequence[jax.Array | None],
    weights: jax.Array,
    insides: Insides,
) -> OwnNorm:
    """With P diagonal in orthonormal bases, one for each axis: `weights`, like the blocks."""
    square = _sum(weights * jnp.square(rotate(blocks, vectors, back=True)))
    for basis, inside in reversed(list(zip(vectors, insides, strict=True))):
        if basis is not None and inside is not None:
            # How much of every column lies within the leaf.
            rows = (
                jnp.arange(basis.shape[1], dtype=jnp.int32)[None, :, None] < inside[:, None, None]
            )
            part = jnp.sum(jnp.where(rows, jnp.square(basis), 0), axis=1)
            weights = weights * part.reshape(-1, *(1,) * (weights.ndim - 2), part.shape[1])
        weights = jnp.sum(weights, axis=-1)
    return OwnNorm(square, weights)


def _kept(values_BxN: jax.Array, inside: jax.Array | None) -> jax.Array:
    if inside is None:
        return values_BxN
    return jnp.where(
        jnp.arange(values_BxN.shape[1], dtype=jnp.int32)[None] < inside[:, None], values_BxN, 0
    )


def _sum(blocks: jax.Array) -> jax.Array:
    return jnp.sum(blocks, axis=tuple(range(1, blocks.ndim)))
