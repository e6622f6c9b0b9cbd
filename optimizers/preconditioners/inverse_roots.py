"""Shampoo's factors: how they are kept, learn from gradients, get their roots, and precondition."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...core.arithmetic import bias_correction, is_summable, lerp, wide
from ..links.graft import norm_ratio
from ..matrix.algebra.kronecker import mode_gram, rotate
from ..matrix.algebra.packing import pack, unpack
from ..matrix.algebra.roots import Method, exponent_fraction, inverse_root
from ..matrix.batch.refresh import Refresh, refreshed
from ..matrix.batch.together import Unit, together
from ..matrix.mesh.exchange import total
from ..matrix.mesh.shards import flat_axes, reshape
from ..matrix.shape.blocking import Blocking
from .block_state import identities, usable_blocks


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

    @property
    def growth(self) -> int:
        """By how much what is kept grows when it is loaded."""
        return 2 if self.packed else 1

    def keep(self, matrices: jax.Array) -> jax.Array:
        """To what is kept."""
        kept = pack(matrices) if self.packed else matrices
        return kept if self.dtype is None else kept.astype(self.dtype)

    def load(self, kept: jax.Array, size: int) -> jax.Array:
        """To matrices in at least float32."""
        return unpack(wide(kept), size) if self.packed else wide(kept)


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
    statistics: Storage
    roots: Storage

    def factor(self, scalars: jax.Array, size: int) -> Factor:
        """The factor at the start; `scalars` are zeros, one for each block."""
        identity = identities(scalars, size)
        # Every field a buffer of its own: the state is donated.
        statistics = self.statistics.keep(jnp.zeros_like(identity))
        residual, condition = (jnp.zeros_like(scalars) for _ in range(2))
        failures, refused = (jnp.zeros_like(scalars, dtype=jnp.int32) for _ in range(2))
        root = self.roots.keep(identity)
        return Factor(statistics, root, residual, condition, failures, refused)

    def exponent_of(self, factors: Sequence[Any]) -> float:
        """Of the roots of a tensor with these factors, None where an axis has none."""
        axes = sum(bool(factor) for factor in factors)
        return -1 / (2 * axes) if self.exponent is None else self.exponent

    def check(self, paths: Sequence[str], blockings: Sequence[Blocking]) -> None:
        """Raises where the method does not find the roots that a leaf needs."""
        check_root = getattr(self.method, "check_root", None)
        if check_root is None:
            return
        for path, blocking in zip(paths, blockings, strict=True):
            for marks in blocking.factored:
                if any(marks):
                    try:
                        check_root(exponent_fraction(self.exponent_of(marks))[1])
                    except ValueError as error:
                        raise ValueError(
                            f"parameter {path} has {sum(marks)} axes with a factor: {error}"
                        ) from None

    def learn(
        self,
        gradients: Sequence[jax.Array],
        blockings: Sequence[Blocking],
        leaves: Sequence[Pieces],
        max_elements: int | None,
    ) -> tuple[list[Pieces], list[list[jax.Array]]]:
        """Factors whose statistics contain the gradients of usable blocks; and which these are.

        A block is usable if the squares of its gradient can be summed, and its new statistics are
        finite. Which it is, `[L, *counts]`, comes by leaf and tensor.
        """
        units, shapes = [], []
        for gradient, blocking, pieces in zip(gradients, blockings, leaves, strict=True):
            for blocks, factors in zip(blocking.to_blocks(gradient), pieces, strict=True):
                roots = _flat(factors, "root") if self.kl else None
                flat = flat_axes(blocks, blocks.ndim - len(factors))
                usable = jnp.ones(flat.shape[:1], bool)
                shapes.append(blocks.shape[: blocks.ndim - len(factors)])
                units.append(
                    Unit(
                        (*_kind(blocks, factors), blocking.summed),
                        (flat, roots),
                        (usable, _flat(factors, "statistics")),
                        is_whole=bool(blocking.summed),
                        growth=self.statistics.growth,
                    )
                )
        found = together(units, self._learned, max_elements)
        flags = iter(reshape(x, shape) for (x, _), shape in zip(found, shapes, strict=True))
        statistics = iter(kept for _, kept in found)
        return (
            [
                tuple(_with(factors, "statistics", next(statistics)) for factors in pieces)
                for pieces in leaves
            ],
            [[next(flags) for _ in pieces] for pieces in leaves],
        )

    def _learned(self, kind: Any, carry: Any, beside: Any) -> Any:
        (sizes, axes, summed), (_, kept), (blocks, roots) = kind, carry, beside
        order = len(sizes)
        usable = usable_blocks(wide(blocks), order, summed)
        seen = jnp.where(usable.reshape(-1, *(1,) * order), wide(blocks), 0)
        loaded = self._loaded(roots or (), sizes, axes)
        pairs = []
        for axis, statistics in zip(axes, kept, strict=True):
            others = [None if at == axis else root for at, root in enumerate(loaded)]
            gram = total(mode_gram(rotate(seen, others), axis, order), summed)
            old = self.statistics.load(statistics, sizes[axis])
            new = _accumulated(gram, old, self.b2)
            # Nothing in a positive semi-definite matrix is larger than its trace.
            fits = is_summable(jnp.trace(new, axis1=1, axis2=2))
            # What has been spoiled from outside is for the certificate of its root to find.
            usable &= fits | ~is_summable(jnp.trace(old, axis1=1, axis2=2))
            pairs.append((new, old))
        return usable, [
            self.statistics.keep(jnp.where(usable[:, None, None], new, old)) for new, old in pairs
        ]

    def _loaded(
        self, kept: Sequence[jax.Array], sizes: Sequence[int], axes: Sequence[int]
    ) -> list[jax.Array | None]:
        """By axis a matrix, or None without one."""
        loaded: list[jax.Array | None] = [None] * len(sizes)
        for axis, x in zip(axes, kept, strict=False):
            loaded[axis] = self.roots.load(x, sizes[axis])
        return loaded

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
                for axis, (factor, size) in enumerate(zip(factors, grid.sizes, strict=True)):
                    if factor is not None:
                        flat = [flat_axes(x, factor.residual.ndim) for x in factor]
                        exponent = self.exponent_of(factors)
                        inside = grid.inside(axis, factor.residual.shape[0])
                        units.append(
                            Unit(
                                (exponent, size),
                                (flat[0], None if inside is None else jnp.asarray(inside)),
                                tuple(flat[1:]),
                                blocking.shards,
                                growth=self.statistics.growth,
                            )
                        )
                        shapes.append(factor)
        weight = _weight(self.b2, step)

        def new_roots(kind: Any, carry: Any, source: Any) -> Any:
            return self._refreshed(kind, source, carry, weight)

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

    def _refreshed(self, kind: Any, source: Any, carry: Any, weight: Any) -> Any:
        (exponent, size), (kept, inside) = kind, source
        root, residual, condition, failures, refused = carry
        statistics = self.statistics.load(kept, size)
        if weight is not None:
            statistics = statistics / weight.astype(statistics.dtype)
        found = inverse_root(
            statistics,
            exponent,
            self.method,
            ridge=self.ridge,
            absolute_ridge=self.absolute_ridge,
            size=inside,
        )
        # Of statistics that are still zero there is nothing to learn, and nothing has failed.
        seen = jnp.any(statistics != 0, axis=(1, 2))
        good, bad = found.residual <= self.tolerance, found.residual > self.tolerance
        good, bad = good & seen, bad & seen
        new = self.roots.keep(found.root).astype(root.dtype)
        return (
            jnp.where(jnp.expand_dims(good, tuple(range(1, root.ndim))), new, root),
            jnp.where(seen, found.residual, residual),
            jnp.where(seen, found.condition, condition),
            jnp.where(good, 0, failures + bad.astype(jnp.int32)),
            refused + bad.astype(jnp.int32),
        )

    def apply(
        self,
        means: Sequence[jax.Array],
        blockings: Sequence[Blocking],
        leaves: Sequence[Pieces],
        max_elements: int | None,
    ) -> list[list[jax.Array]]:
        """The preconditioned blocks of every leaf."""
        units, shapes = [], []
        for mean, blocking, pieces in zip(means, blockings, leaves, strict=True):
            for blocks, factors in zip(blocking.to_blocks(mean), pieces, strict=True):
                flat = flat_axes(blocks, blocks.ndim - len(factors))
                roots = _flat(factors, "root")
                units.append(Unit(_kind(blocks, factors), roots, flat, growth=self.roots.growth))
                shapes.append(blocks.shape)
        found = (
            reshape(x, shape)
            for x, shape in zip(together(units, self._applied, max_elements), shapes, strict=True)
        )
        return [[next(found) for _ in pieces] for pieces in leaves]

    def _applied(self, kind: Any, blocks: jax.Array, roots: Sequence[jax.Array]) -> jax.Array:
        return rotate(blocks, self._loaded(roots, *kind)) if roots else blocks

    def distrusted(self, factors: Sequence[Factor | None], blocks: jax.Array) -> jax.Array:
        """Which blocks `[L, *counts]` have no root to trust."""
        failed = jnp.zeros(blocks.shape[: blocks.ndim - len(factors)], bool)
        for factor in factors:
            failed = failed if factor is None else failed | (factor.failures > self.patience)
        return failed


def _kind(blocks: jax.Array, factors: Sequence[Factor | None]) -> tuple[Any, Any]:
    """The sizes of a block, and its axes with a factor."""
    axes = tuple(axis for axis, factor in enumerate(factors) if factor is not None)
    return blocks.shape[blocks.ndim - len(factors) :], axes


def _flat(factors: Sequence[Factor | None], name: str) -> list[jax.Array]:
    """A field of all factors, in batches."""
    return [flat_axes(getattr(f, name), f.residual.ndim) for f in factors if f is not None]


def _with(
    factors: Sequence[Factor | None], name: str, values: Sequence[jax.Array]
) -> tuple[Factor | None, ...]:
    """The factors with a field replaced."""
    left = iter(values)
    return tuple(
        f and f._replace(**{name: reshape(next(left), getattr(f, name).shape)}) for f in factors
    )


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
