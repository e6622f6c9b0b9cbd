"""Shampoo's factors: how they are kept, learn from gradients, get their roots, and precondition."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._arithmetic import bias_correction, lerp, wide
from ._blocking import Blocking
from ._tensors import finite_blocks, identities
from .graft import norm_ratio
from .matrix.distribute import total
from .matrix.kronecker import mode_gram, rotate
from .matrix.packing import pack, unpack
from .matrix.placement import Names
from .matrix.refresh import Refresh, Unit, refreshed
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

    def learn(self, gradient: jax.Array, blocking: Blocking, pieces: Pieces) -> Pieces:
        """Factors whose statistics contain the gradient, but of blocks where it is not finite."""
        return tuple(
            self._learn(wide(blocks), factors, blocking.summed)
            for blocks, factors in zip(blocking.to_blocks(gradient), pieces, strict=True)
        )

    def _learn(self, blocks: jax.Array, factors: tuple[Factor | None, ...], summed: Names) -> Any:
        order = len(factors)
        usable, blocks = finite_blocks(blocks, order, summed)
        roots = self._roots(blocks, factors) if self.kl else []

        def learned(axis: int, factor: Factor) -> Factor:
            seen = blocks
            if self.kl:
                seen = rotate(blocks, [None if at == axis else r for at, r in enumerate(roots)])
            old = self.storage.load(factor.statistics, blocks.shape[blocks.ndim - order + axis])
            gram = total(mode_gram(seen, axis, order), summed)
            new = _accumulated(gram, old, self.b2)
            return factor._replace(
                statistics=self.storage.keep(jnp.where(usable[..., None, None], new, old))
            )

        return tuple(None if f is None else learned(axis, f) for axis, f in enumerate(factors))

    def _roots(self, blocks: jax.Array, factors: Sequence[Factor | None]) -> list[jax.Array | None]:
        sizes = blocks.shape[blocks.ndim - len(factors) :]
        return [
            None if f is None else self.storage.load(f.root, size)
            for f, size in zip(factors, sizes, strict=True)
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
        self, mean: jax.Array, blocking: Blocking, pieces: Pieces
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The preconditioned blocks, and which of them have no root to trust."""
        directions, distrusted = [], []
        for blocks, factors in zip(blocking.to_blocks(mean), pieces, strict=True):
            directions.append(rotate(blocks, self._roots(blocks, factors)))
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
