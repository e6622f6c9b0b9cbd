"""Momentum whitened in eigenbases that minimise a divergence: how `kl_shampoo` treats blocks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...core.arithmetic import cast, ema, has_summable_trace, is_usable, lerp, wide, wide_dtype
from ...core.once import either, if_due
from ...core.own_norm import OwnNorm
from ..matrix.algebra.eigenbasis import eigenbasis, followed, off_diagonal
from ..matrix.algebra.kronecker import mode_gram, mode_product, rotate
from ..matrix.batch.phases import refreshed
from ..matrix.batch.refresh import Refresh
from ..matrix.batch.together import Unit, together
from .block_state import by_axis, identities, with_fields, zero_unless
from .own_norm import Insides, forms, in_basis
from .tensors import Tensors


class KLFactor(NamedTuple):
    """State for one axis of the blocks of one tensor; the first axes are `[*batch, *counts]`."""

    statistics: jax.Array  # [..., b, b]
    vectors: jax.Array  # [..., b, b]: the eigenbasis, in columns
    eigenvalues: jax.Array  # [..., b]: their own moving averages


KLFactors = tuple[KLFactor | None, ...]
"""The factors of a tensor, by axis."""


class KLEigenbasis(NamedTuple):
    """One step for blocks and their factors."""

    b1: Any
    b2: Any
    eps: Any
    initial_eigenvalue: Any
    max_inverse_root: float
    learns: jax.Array | None = None  # whether factors are updated in this step; None for always

    def factor(self, scalars: jax.Array, size: int) -> KLFactor:
        """The factor at the start; `scalars` are zeros, one for each block."""
        identity = identities(scalars, size)
        values = jnp.zeros_like(identity[..., 0]) + self.initial_eigenvalue
        return KLFactor(jnp.zeros_like(identity), identity, values)

    def step(self, is_first: jax.Array, kind: Any, carry: Any, _: Any) -> Any:
        """Direction, mean and factors, from gradient, mean and factors."""
        (order, axes), (blocks, mu, kept) = kind, carry
        learned = functools.partial(self._learned, is_first, axes, blocks)
        usable = is_usable(blocks, tuple(range(-order, 0)))
        usable, new = if_due(self.learns, learned, (usable, kept))
        seen = zero_unless(usable, wide(blocks))
        mean = jnp.where(is_first, mu, cast(lerp(seen, mu, self.b1), mu.dtype))
        moved = _whitened(
            cast(mean, wide_dtype(mu.dtype, blocks.dtype)), by_axis(kept, axes, order), self.eps
        )
        return cast(jnp.where(is_first, 0, moved), blocks.dtype), mean, new

    def _learned(
        self, is_first: jax.Array, axes: Sequence[int], blocks: jax.Array, carry: Any
    ) -> Any:
        """Which blocks are usable, and the factors updated with their gradients.

        Every axis uses the previous values of the others. A block is usable if its squares can be summed
        after whitening too.
        """
        (usable, kept), seen = carry, wide(blocks)
        order, sizes = blocks.ndim - usable.ndim, blocks.shape[usable.ndim :]
        factors = by_axis(kept, axes, order)
        roots = [None if f is None else f.eigenvalues**-0.5 for f in factors]
        rotated = rotate(seen, [None if f is None else f.vectors for f in factors], back=True)

        def one(axis: int, own: KLFactor) -> tuple[jax.Array, jax.Array, jax.Array]:
            others = [None if at == axis else root for at, root in enumerate(roots)]
            whitened = rotated * _outer(others, blocks)
            away = tuple(at - order for at in range(order) if at != axis)
            count = max(1, math.prod(sizes[:axis] + sizes[axis + 1 :]))
            mean = jnp.sum(jnp.square(whitened), axis=away) / count
            plain = jnp.where(is_first, seen, mode_product(whitened, own.vectors, axis, order))
            gram = mode_gram(plain, axis, order) / count
            new = ema((mean, gram), (own.eigenvalues, own.statistics), self.b2)
            values = jnp.maximum(new[0], self._floor(sizes[axis]))
            return has_summable_trace(gram), new[1], values

        found = [one(axis, own) for axis, own in zip(axes, kept, strict=True)]
        for fits, *_ in found:
            usable &= fits
        return usable, [
            KLFactor(
                jnp.where(usable[..., None, None], statistics, old.statistics),
                old.vectors,
                jnp.where(usable[..., None] & ~is_first, values, old.eigenvalues),
            )
            for (_, statistics, values), old in zip(found, kept, strict=True)
        ]

    def _floor(self, size: int) -> float:
        return max(10.0, min(float(size), self.max_inverse_root)) ** -2


def stepped(
    tensors: Tensors,
    gradients: Sequence[jax.Array],
    means: Sequence[jax.Array],
    factors: Sequence[KLFactors],
    step: Callable[[Any, Any, Any], Any],
) -> tuple[list[jax.Array], list[jax.Array], list[KLFactors]]:
    """Directions, means and factors after the gradients of this step; all in blocks."""
    units = [
        Unit(
            (len(tensor.sizes), tensor.axes),
            (),
            (blocks, mean, [each for each in kept if each is not None]),
            tensor.spread,
        )
        for tensor, blocks, mean, kept in zip(tensors, gradients, means, factors, strict=True)
    ]
    found = together(units, step, any_axes=True)
    learned = []
    for kept, (*_, new) in zip(factors, found, strict=True):
        left = iter(new)
        learned.append(tuple(factor and next(left) for factor in kept))
    return [direction for direction, *_ in found], [mean for _, mean, _ in found], learned


def _outer(vectors: list[jax.Array | None], blocks: jax.Array) -> jax.Array:
    """The product of one vector per axis, as `[..., b1, ..., bk]`, with ones where there is none."""
    order = len(vectors)
    product = jnp.ones((1,) * blocks.ndim, wide_dtype(blocks.dtype))
    for axis, vector in enumerate(vectors):
        if vector is not None:
            inside = [vector.shape[-1] if at == axis else 1 for at in range(order)]
            product = product * vector.reshape(*vector.shape[:-1], *inside)
    return product


def _whitened(mean: jax.Array, factors: Any, eps: Any) -> jax.Array:
    vectors = [None if f is None else f.vectors for f in factors]
    return rotate(rotate(mean, vectors, back=True) / (_root(factors, mean) + eps), vectors)


def _root(factors: Any, blocks: jax.Array) -> jax.Array:
    """The root of the product of eigenvalues, for every element of blocks in their bases."""
    return _outer([None if f is None else jnp.sqrt(f.eigenvalues) for f in factors], blocks)


def norms(
    tensors: Tensors,
    gradients: Sequence[jax.Array],
    factors: Sequence[KLFactors],
    eps: Any,
) -> list[OwnNorm]:
    """The norms of blocks, by the same product as `_whitened`."""

    def norm(axes: Any, blocks: jax.Array, kept: Any, insides: Insides) -> OwnNorm:
        factors = by_axis(kept, axes, blocks.ndim - 1)
        vectors = [None if f is None else f.vectors for f in factors]
        weights = jnp.broadcast_to(1 / (_root(factors, blocks) + eps), blocks.shape)
        return in_basis(blocks, vectors, weights, insides)

    kinds = [tensor.axes for tensor in tensors]
    kept = [[factor for factor in each if factor is not None] for each in factors]
    return forms(tensors, gradients, kinds, kept, norm)


def refreshed_factors(
    tensors: Tensors,
    factors: Sequence[KLFactors],
    schedule: Refresh,
    count: jax.Array,
    *,
    balance: bool,
) -> list[KLFactors]:
    """The factors with new bases where they are due."""

    is_first = count == 1

    def new(_: Any, vectors: jax.Array, statistics: jax.Array) -> jax.Array:
        first = lambda _: eigenbasis(statistics)
        follow = lambda vectors: followed(statistics, vectors, sort=False)[0]
        return either(is_first, first, follow, vectors)

    def off(_: Any, vectors: jax.Array, statistics: jax.Array) -> jax.Array:
        return off_diagonal(statistics, vectors)

    units = [
        Unit(None, factor.statistics, factor.vectors, tensor.spread)
        for tensor, each in zip(tensors, factors, strict=True)
        for factor in each
        if factor is not None
    ]
    due = lambda phase: is_first | schedule.follows(count, phase)
    need = schedule.by_need(count, off, is_first)
    turned = iter(refreshed(units, new, schedule.phases, due, need=need))
    found = [
        tuple(factor and factor._replace(vectors=next(turned)) for factor in each)
        for each in factors
    ]
    follows = schedule.follows(count, 0)
    return [_balanced(each, follows) for each in found] if balance else found


def _balanced(factors: Sequence[KLFactor | None], due: jax.Array) -> tuple[KLFactor | None, ...]:
    """The factors rescaled to the same mean eigenvalue, with their product unchanged, where due."""
    present = [factor for factor in factors if factor is not None]
    if len(present) < 2:
        return tuple(factors)
    logs = [jnp.log(jnp.mean(factor.eigenvalues, axis=-1)) for factor in present]
    common = sum(logs[1:], logs[0]) / len(logs)
    scales = [jnp.where(due, jnp.exp(common - log), 1)[..., None] for log in logs]
    scaled = list(zip(present, scales, strict=True))
    return with_fields(
        factors,
        statistics=[factor.statistics * by[..., None] for factor, by in scaled],
        eigenvalues=[factor.eigenvalues * by for factor, by in scaled],
    )
