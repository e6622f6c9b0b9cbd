"""Shampoo's factors: how they are stored, updated, rooted, and used to precondition."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...core.arithmetic import (
    bias_correction,
    ema,
    has_summable_trace,
    is_usable,
    wide,
    wide_dtype,
)
from ...core.once import if_due
from ...core.own_norm import OwnNorm
from ..matrix.algebra.kronecker import mode_grams, rotate
from ..matrix.algebra.packing import pack, unpack
from ..matrix.algebra.roots import exponent_fraction, inverse_root, misfit
from ..matrix.batch.phases import refreshed
from ..matrix.batch.refresh import Refresh
from ..matrix.batch.together import Unit, together
from ..matrix.shape.blocking import Blocking
from .block_graft import BlockGraft
from .block_state import by_axis, fields, identities, with_fields, zeros_each
from .options import Factors, Roots
from .own_norm import Insides, forms, of_factors
from .tensors import Tensors

FAILURES = 2
"""Where a factor's record counts failures."""


class Factor(NamedTuple):
    """State for one axis of the blocks of one tensor; the first axes are `[*batch, *counts]`."""

    statistics: jax.Array  # [..., b, b], or packed: mean (or sum) of Gram matrices
    root: jax.Array  # the same: the last root that passed its certificate, initially the identity
    record: jax.Array  # [..., 4]: what was found out about roots, by the properties below

    @property
    def residual(self) -> jax.Array:
        """The largest element of `|A R^p - I|` of the last root tried."""
        return self.record[..., 0]

    @property
    def condition(self) -> jax.Array:
        """The estimated condition number at that time."""
        return self.record[..., 1]

    @property
    def failures(self) -> jax.Array:
        """How many roots were refused since the last good one, int32."""
        return self.record[..., FAILURES].astype(jnp.int32)

    @property
    def refused(self) -> jax.Array:
        """How many roots were refused so far, int32."""
        return self.record[..., 3].astype(jnp.int32)


TensorFactors = tuple[Factor | None, ...]
"""The factors of a tensor, by axis."""


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """Statistics and roots of the factors of all leaves."""

    b2: Any
    """The decay rate of the statistics per gradient that updates them."""
    factors: Factors
    roots: Roots
    schedule: Refresh

    def _kept(self, matrices: jax.Array, dtype: Any) -> jax.Array:
        """Symmetric matrices as they are stored."""
        kept = pack(matrices) if self.factors.packed else matrices
        return kept if dtype is None else kept.astype(dtype)

    def _loaded(self, kept: jax.Array, size: int, dtype: Any) -> jax.Array:
        """The inverse of `_kept`, in the dtype that the matrices are used in."""
        kept = kept.astype(dtype)
        return unpack(kept, size) if self.factors.packed else kept

    @functools.cached_property
    def _growth(self) -> int:
        """The growth in memory when stored matrices are loaded."""
        return 2 if self.factors.packed else 1

    def factor(self, scalars: jax.Array, size: int) -> Factor:
        """The factor at the start; `scalars` are zeros, one for each block."""
        identity = identities(scalars, size)
        # Every field has its own buffer, since the state is donated.
        statistics = self._kept(jnp.zeros_like(identity), self.factors.statistics_dtype)
        root = self._kept(identity, self.factors.root_dtype)
        # One array for four numbers: a leaf's arrays are separate kernels wherever leaves are joined.
        return Factor(statistics, root, zeros_each(scalars, 4))

    def exponent_of(self, factors: Sequence[Any]) -> float:
        """The exponent of a tensor's roots; its factors are None on axes without one."""
        axes = sum(bool(factor) for factor in factors)
        exponent = self.roots.exponent
        return -1 / (2 * axes) if exponent is None else exponent

    def check(self, paths: Sequence[str], blockings: Sequence[Blocking]) -> None:
        """Raises if the method cannot compute the roots that a leaf needs."""
        check_root = getattr(self.roots.method, "check_root", None)
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
        tensors: Tensors,
        gradients: Sequence[jax.Array],
        factors: Sequence[TensorFactors],
        step: jax.Array,
    ) -> tuple[list[jax.Array], list[TensorFactors]]:
        """Which blocks of the gradients are usable, and the factors updated with those blocks.

        A block is usable if the squares of its gradient can be summed, and new statistics are finite.
        """
        kl = self.factors.statistics == "kl"
        units = [
            Unit(
                (tensor.sizes, tensor.axes, tensor.summed),
                (blocks, fields(each, "root") if kl else None),
                (jnp.ones(tensor.counts, bool), fields(each, "statistics")),
                tensor.spread,
                is_whole=bool(tensor.summed),
                growth=self._growth,
            )
            for tensor, blocks, each in zip(tensors, gradients, factors, strict=True)
        ]
        learned = functools.partial(self._learned, due=self.schedule.learning(step))
        found = together(units, learned, self.factors.max_elements, any_axes=True)
        return [usable for usable, _ in found], [
            with_fields(each, statistics=statistics)
            for each, (_, statistics) in zip(factors, found, strict=True)
        ]

    def _learned(self, kind: Any, carry: Any, beside: Any, *, due: jax.Array | None) -> Any:
        (sizes, axes, summed), (_, kept), (blocks, roots) = kind, carry, beside
        order, every = len(sizes), self.schedule.statistics_every
        usable = is_usable(blocks, tuple(range(-order, 0)), summed)

        def learned(carry: Any) -> Any:
            usable, kept = carry
            seen = wide(blocks)
            others = self._roots(roots, sizes, axes, seen.dtype) if roots else None
            grams = jax.lax.psum(mode_grams(seen, axes, order, others), summed)
            old = [
                self._loaded(x, sizes[axis], wide_dtype(gram.dtype, x.dtype))
                for x, axis, gram in zip(kept, axes, grams, strict=True)
            ]
            new = _accumulated(grams, old, self.b2, every)
            for fits, fitted in zip(*has_summable_trace((new, old)), strict=True):
                # Statistics corrupted from outside are left to the certificate of their root.
                usable &= fits | ~fitted
            return usable, [
                self._kept(jnp.where(usable[..., None, None], after, before), x.dtype)
                for after, before, x in zip(new, old, kept, strict=True)
            ]

        return if_due(due, learned, (usable, kept))

    def _roots(
        self, kept: Sequence[jax.Array], sizes: Sequence[int], axes: Sequence[int], dtype: Any
    ) -> list[jax.Array | None]:
        """A matrix of this dtype for each axis, or None for axes without one."""
        loaded = [self._loaded(x, sizes[at], dtype) for x, at in zip(kept, axes, strict=True)]
        return by_axis(loaded, axes, len(sizes))

    def refresh(
        self,
        tensors: Tensors,
        factors: Sequence[TensorFactors],
        step: jax.Array,
    ) -> list[TensorFactors]:
        """The factors, with new roots where they are due and pass their certificate."""
        units = [
            Unit(
                (self.exponent_of(each), tensor.sizes[axis]),
                (factor.statistics, tensor.inside[axis]),
                tuple(factor[1:]),
                tensor.spread,
                growth=self._growth,
            )
            for tensor, each in zip(tensors, factors, strict=True)
            for axis, factor in enumerate(each)
            if factor is not None
        ]
        schedule = self.schedule
        weight = _weight(self.b2, schedule.learned(step))

        def new_roots(kind: Any, carry: Any, source: Any) -> Any:
            return self._refreshed(kind, source, carry, weight)

        def misfits(kind: Any, carry: Any, source: Any) -> jax.Array:
            return self._misfit(kind, source, carry, weight)

        due, need = functools.partial(schedule.due, step), schedule.by_need(step, misfits)
        most = self.factors.max_elements
        found = iter(refreshed(units, new_roots, schedule.phases, due, most, need))
        return [
            tuple(factor and Factor(factor.statistics, *next(found)) for factor in each)
            for each in factors
        ]

    def _refreshed(self, kind: Any, source: Any, carry: Any, weight: Any) -> Any:
        (exponent, _), (_, inside), options = kind, source, self.roots
        root, record = carry
        residual, condition, failures, refused = jnp.unstack(record, axis=1)
        statistics = self._corrected(kind, source, weight, record.dtype)
        found = inverse_root(
            statistics,
            exponent,
            options.method,
            ridge=options.ridge,
            absolute_ridge=options.absolute_ridge,
            size=inside,
        )
        # Statistics that are still zero have no root, and that is no failure.
        seen = jnp.any(statistics != 0, axis=(1, 2))
        good, bad = found.residual <= options.tolerance, found.residual > options.tolerance
        good, bad = good & seen, bad & seen
        new = self._kept(found.root, root.dtype)
        found_out = (
            jnp.where(seen, found.residual.astype(record.dtype), residual),
            jnp.where(seen, found.condition.astype(record.dtype), condition),
            jnp.where(good, 0, failures + bad.astype(record.dtype)),
            refused + bad.astype(record.dtype),
        )
        good = jnp.expand_dims(good, tuple(range(1, root.ndim)))
        return jnp.where(good, new, root), jnp.stack(found_out, axis=1)

    def _corrected(self, kind: Any, source: Any, weight: Any, dtype: Any) -> jax.Array:
        """The statistics that roots are computed from, at least as wide as `dtype`."""
        dtype = wide_dtype(source[0].dtype, dtype)
        statistics = self._loaded(source[0], kind[1], dtype)
        return statistics if weight is None else statistics / weight.astype(statistics.dtype)

    def _misfit(self, kind: Any, source: Any, carry: Any, weight: Any) -> jax.Array:
        (exponent, size), (_, inside), (root, record) = kind, source, carry
        statistics = self._corrected(kind, source, weight, record.dtype)
        return misfit(
            statistics,
            self._loaded(root, size, statistics.dtype),
            exponent,
            ridge=self.roots.ridge,
            absolute_ridge=self.roots.absolute_ridge,
            size=inside,
        )

    def apply(
        self,
        tensors: Tensors,
        means: Sequence[jax.Array],
        steps: Sequence[jax.Array],
        factors: Sequence[TensorFactors],
        graft: BlockGraft,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The preconditioned blocks of means, grafted onto steps, and their ratios of sizes."""
        units = [
            Unit(
                (tensor.sizes, tensor.axes, tensor.summed),
                ([(factor.root, factor.record) for factor in each if factor is not None], step),
                (blocks, jnp.ones(tensor.counts, blocks.dtype)),
                tensor.spread,
                is_whole=bool(tensor.summed),
                growth=self._growth,
            )
            for tensor, blocks, step, each in zip(tensors, means, steps, factors, strict=True)
        ]
        applied = functools.partial(self._applied, graft)
        found = together(units, applied, self.factors.max_elements, any_axes=True)
        return [blocks for blocks, _ in found], [ratios for _, ratios in found]

    def _applied(self, graft: BlockGraft, kind: Any, carry: Any, source: Any) -> Any:
        (*of_roots, summed), (blocks, _), (kept, steps) = kind, carry, source
        roots, directions = [root for root, _ in kept], blocks
        if roots:
            directions = rotate(blocks, self._roots(roots, *of_roots, dtype=blocks.dtype))
        distrusted = self.distrusted([record for _, record in kept])
        return graft.of_batch(directions, steps, distrusted, len(of_roots[0]), summed)

    def distrusted(self, records: Sequence[jax.Array]) -> list[jax.Array]:
        """For the record of each factor, whether its blocks have no trusted root."""
        return [record[..., FAILURES] > self.roots.patience for record in records]

    def norms(
        self,
        tensors: Tensors,
        gradients: Sequence[jax.Array],
        factors: Sequence[TensorFactors],
    ) -> list[OwnNorm]:
        """The norms of blocks, with the roots there are."""
        return forms(
            tensors,
            gradients,
            [(tensor.sizes, tensor.axes) for tensor in tensors],
            [fields(each, "root") for each in factors],
            self._norm,
            growth=self._growth,
            max_elements=self.factors.max_elements,
        )

    def _norm(self, kind: Any, blocks: jax.Array, roots: Any, insides: Insides) -> OwnNorm:
        return of_factors(blocks, self._roots(roots, *kind, dtype=blocks.dtype), insides)


def _is_number(b2: Any) -> bool:
    return isinstance(b2, (int, float))


def _accumulated(
    new: Sequence[jax.Array], old: Sequence[jax.Array], keep: Any, every: int
) -> list[jax.Array]:
    """The moving averages with that decay rate, or the sums if it is one, where `new` counts for `every`
    gradients."""
    if not _is_number(keep):
        take = jnp.where(keep == 1, jnp.full_like(keep, every), 1 - keep)
        one = lambda x, y: keep.astype(y.dtype) * y + take.astype(y.dtype) * x.astype(y.dtype)
    elif keep == 1:
        one = lambda x, y: y + every * x.astype(y.dtype)
    else:
        return ema(new, old, keep)
    return list(map(one, new, old))


def _weight(b2: Any, count: jax.Array) -> jax.Array | None:
    """The divisor that corrects statistics for their start from zero, after that many gradients."""
    if _is_number(b2):
        return None if b2 == 1 else bias_correction(b2, count)
    return jnp.where(b2 == 1, 1, bias_correction(jnp.where(b2 == 1, 0.5, b2), count))
