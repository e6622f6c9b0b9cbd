"""Shampoo's factors: how they are kept, learn from gradients, get their roots, and precondition."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._arithmetic import bias_correction, lerp, wide
from ._blocking import Blocking
from ._tensors import finite_blocks, identities
from .graft import norm_ratio
from .matrix.batching import in_chunks, largest_chunk
from .matrix.distribute import total
from .matrix.kronecker import mode_gram, rotate
from .matrix.packing import pack, unpack
from .matrix.placement import Names
from .matrix.refresh import REFRESHED_ELSEWHERE, Refresh, Unit, refreshed
from .matrix.roots import Method, inverse_root
from .matrix.shards import flat_axes, reshape


class Factor(NamedTuple):
    """What is kept for one axis of the blocks of one tensor; the first axes are `[L, *counts]`."""

    statistics: jax.Array  # [..., b, b], or packed: mean (or sum) of Gram matrices
    root: jax.Array  # likewise: the last root that passed its certificate, at first the identity
    residual: jax.Array  # largest element of |A X^p - I| of the last root tried
    condition: jax.Array  # estimated condition number then
    failures: jax.Array  # int32, refused roots since the last good one
    refused: jax.Array  # int32, refused roots so far


Kept = tuple[jax.Array | None, ...]
"""Statistics or roots of a tensor, by axis, as they are kept."""

Pieces = tuple[tuple[Factor | None, ...], ...]
"""Factors of a leaf: by tensor, by axis."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How symmetric matrices are kept."""

    dtype: Any = None
    packed: bool = False

    def keep(self, matrices: jax.Array) -> jax.Array:
        """To what is kept."""
        kept = pack(matrices) if self.packed else matrices
        return kept if self.dtype is None else kept.astype(self.dtype)

    def load(self, kept: jax.Array, size: int) -> jax.Array:
        """To matrices in at least float32."""
        return unpack(wide(kept), size) if self.packed else wide(kept)

    def factor(self, scalars: jax.Array, size: int) -> Factor:
        """The factor at the start; `scalars` are zeros, one for each block."""
        kept = self.keep(identities(scalars, size))
        # Every field a buffer of its own: the state is donated.
        residual, condition = (jnp.zeros_like(scalars) for _ in range(2))
        failures, refused = (jnp.zeros_like(scalars, dtype=jnp.int32) for _ in range(2))
        return Factor(jnp.zeros_like(kept), kept, residual, condition, failures, refused)


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """Statistics and roots of the factors of all leaves."""

    b2: Any
    kl: bool
    exponent: float | None
    method: Method | None
    ridge: Any
    absolute_ridge: Any
    tolerance: float
    patience: int
    storage: Storage

    def learn(
        self, gradient: jax.Array, blocking: Blocking, pieces: Pieces, max_elements: int | None
    ) -> Pieces:
        """Factors whose statistics contain the gradient, but of blocks where it is not finite."""
        return tuple(
            self._learn(wide(blocks), factors, blocking.summed, max_elements)
            for blocks, factors in zip(blocking.to_blocks(gradient), pieces, strict=True)
        )

    def _learn(
        self,
        blocks: jax.Array,
        factors: Sequence[Factor | None],
        summed: Names,
        max_elements: int | None,
    ) -> tuple[Factor | None, ...]:
        order, sizes = len(factors), blocks.shape[blocks.ndim - len(factors) :]

        def learned(kept: Kept, beside: tuple[jax.Array, Kept]) -> Kept:
            usable, blocks = finite_blocks(beside[0], order, summed)
            roots = self._loaded(beside[1], sizes)
            new = []
            for axis, (statistics, size) in enumerate(zip(kept, sizes, strict=True)):
                if statistics is None:
                    new.append(None)
                    continue
                others = [None if at == axis else root for at, root in enumerate(roots)]
                gram = total(mode_gram(rotate(blocks, others), axis, order), summed)
                old = self.storage.load(statistics, size)
                found = _accumulated(gram, old, self.b2)
                new.append(self.storage.keep(jnp.where(usable[:, None, None], found, old)))
            return tuple(new)

        statistics = tuple(None if f is None else f.statistics for f in factors)
        roots = tuple(f.root if self.kl and f is not None else None for f in factors)
        # No collective in a loop.
        bound = sys.maxsize if summed else self._bound(max_elements)
        found = _by_slices(learned, statistics, (blocks, roots), factors, sizes, bound)
        return tuple(
            None if f is None else f._replace(statistics=new)
            for f, new in zip(factors, found, strict=True)
        )

    def _bound(self, max_elements: int | None) -> int | None:
        """The elements to load at once: all, where loading makes no copies."""
        copies = self.storage.packed or self.storage.dtype is not None
        return max_elements if copies else sys.maxsize

    def _loaded(self, kept: Kept, sizes: Sequence[int]) -> list[jax.Array | None]:
        return [
            None if x is None else self.storage.load(x, size)
            for x, size in zip(kept, sizes, strict=True)
        ]

    def refresh(
        self,
        leaves: Sequence[Pieces],
        blockings: Sequence[Blocking],
        schedule: Refresh,
        step: jax.Array,
        max_elements: int | None,
    ) -> list[Pieces]:
        """The leaves' factors, with new roots where they are due and pass their certificate."""
        units, shapes = [], []
        for pieces, blocking in zip(leaves, blockings, strict=True):
            for factors, grid in zip(pieces, blocking.grids, strict=True):
                axes = sum(f is not None for f in factors)
                for factor, size in zip(factors, grid.sizes, strict=True):
                    if factor is not None:
                        exponent = -1 / (2 * axes) if self.exponent is None else self.exponent
                        flat = [flat_axes(x, factor.residual.ndim) for x in factor]
                        units.append(
                            Unit((exponent, size), flat[0], tuple(flat[1:]), blocking.shards)
                        )
                        shapes.append(factor)
        weight = _weight(self.b2, step)

        def new_roots(kind: Any, carry: Any, kept: jax.Array) -> Any:
            return self._refreshed(kind, kept, carry, weight)

        due = lambda phase: schedule.due(step, phase)
        found = refreshed(units, new_roots, schedule.phases, due, max_elements)
        done = iter(
            old._replace(
                **{
                    name: reshape(value, getattr(old, name).shape)
                    for name, value in zip(Factor._fields[1:], carry, strict=True)
                }
            )
            for old, carry in zip(shapes, found, strict=True)
        )
        return [
            tuple(tuple(None if f is None else next(done) for f in factors) for factors in pieces)
            for pieces in leaves
        ]

    def _refreshed(self, kind: Any, kept: jax.Array, carry: Any, weight: Any) -> Any:
        (exponent, size), (root, residual, condition, failures, refused) = kind, carry
        statistics = self.storage.load(kept, size)
        if weight is not None:
            statistics = statistics / weight.astype(statistics.dtype)
        found = inverse_root(
            statistics,
            exponent,
            self.method,
            ridge=self.ridge,
            absolute_ridge=self.absolute_ridge,
        )
        # Of statistics that are still zero there is nothing to learn, and nothing has failed.
        seen = jnp.any(statistics != 0, axis=(1, 2))
        good, bad = found.residual <= self.tolerance, found.residual > self.tolerance
        good, bad = good & seen, bad & seen
        return (
            jnp.where(good[:, None, None], self.storage.keep(found.root).astype(root.dtype), root),
            jnp.where(seen, found.residual, residual),
            jnp.where(seen, found.condition, condition),
            jnp.where(good, 0, failures + bad.astype(jnp.int32)),
            refused + bad.astype(jnp.int32),
        )

    def apply(
        self, mean: jax.Array, blocking: Blocking, pieces: Pieces, max_elements: int | None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The preconditioned blocks, and which of them have no root to trust."""
        directions, distrusted = [], []
        for blocks, factors in zip(blocking.to_blocks(mean), pieces, strict=True):
            sizes = blocks.shape[blocks.ndim - len(factors) :]
            rotated = lambda blocks, kept, sizes=sizes: rotate(blocks, self._loaded(kept, sizes))
            roots = tuple(None if f is None else f.root for f in factors)
            bound = self._bound(max_elements)
            directions.append(_by_slices(rotated, blocks, roots, factors, sizes, bound))
            failed = jnp.zeros(blocks.shape[: blocks.ndim - len(factors)], bool)
            for factor in factors:
                failed = failed if factor is None else failed | (factor.failures > self.patience)
            distrusted.append(failed)
        return directions, distrusted


def grafted(
    directions: Sequence[jax.Array],
    distrusted: Sequence[jax.Array],
    step: jax.Array,
    blocking: Blocking,
    per: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A leaf's update: its blocks' directions with the size of `step`; and the ratios of sizes.

    ``per`` is "block", "parameter" or "none" for directions as they are. Distrusted blocks take `step`.
    """
    steps = [wide(blocks) for blocks in blocking.to_blocks(step)]
    ratio = jnp.ones([], steps[0].dtype)
    if per == "parameter":
        whole = blocking.from_blocks(directions)
        axes = tuple(range(whole.ndim))
        ratio = norm_ratio(step, whole, axes, keep=False, summed=blocking.leaf_names)
    blocks, ratios = [], []
    for direction, failed, other in zip(directions, distrusted, steps, strict=True):
        if per == "block":
            inside = tuple(range(failed.ndim, direction.ndim))
            ratio = norm_ratio(other, direction, inside, keep=False, summed=blocking.summed)
        ratios.append(jnp.broadcast_to(ratio, failed.shape).astype(direction.dtype))
        wider = (...,) + (None,) * (direction.ndim - failed.ndim)
        sized = direction * ratios[-1][wider].astype(direction.dtype)
        blocks.append(jnp.where(failed[wider], other.astype(direction.dtype), sized))
    return blocking.from_blocks(blocks), tuple(ratios)


def _by_slices(
    function: Callable[[Any, Any], Any],
    carry: Any,
    beside: Any,
    factors: Sequence[Factor | None],
    sizes: Sequence[int],
    max_elements: int | None,
) -> Any:
    """``function(carry, beside)`` of arrays `[L, *counts, ...]`, on a bounded number of blocks at once.

    Factors that are kept packed or in less than float32 have copies while they are used, and all of a
    large leaf's at once would be most of the memory that a step takes.
    """
    if not jax.tree.leaves(carry):
        return carry
    flat = lambda tree: jax.tree.map(lambda x: flat_axes(x, 1 + len(sizes)), tree)
    loaded = (size**2 for factor, size in zip(factors, sizes, strict=True) if factor is not None)
    block = math.prod(sizes) + sum(loaded)
    most = largest_chunk((block,), max_elements, REFRESHED_ELSEWHERE)
    found = in_chunks(function, flat(carry), most, beside=flat(beside))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), found, carry)


def _is_number(b2: Any) -> bool:
    return isinstance(b2, (int, float))


def _accumulated(new: jax.Array, old: jax.Array, b2: Any) -> jax.Array:
    """The moving average, or with a b2 of one the sum."""
    if _is_number(b2):
        return old + new if b2 == 1 else lerp(new, old, b2)
    take = jnp.where(b2 == 1, jnp.ones_like(b2), 1 - b2)
    return b2.astype(old.dtype) * old + take.astype(old.dtype) * new


def _weight(b2: Any, step: jax.Array) -> jax.Array | None:
    """What the statistics are divided by, for their start from zero."""
    if _is_number(b2):
        return None if b2 == 1 else bias_correction(b2, step)
    return jnp.where(b2 == 1, 1, bias_correction(jnp.where(b2 == 1, 0.5, b2), step))
