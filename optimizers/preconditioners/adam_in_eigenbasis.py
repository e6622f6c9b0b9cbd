"""Adam in the eigenbases of Kronecker factors, block by block: how `soap` treats a leaf."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...core.arithmetic import cast, cast_like, ema, is_usable, lerp, wide, wide_dtype
from ...core.once import after, either, if_due
from ...core.own_norm import OwnNorm
from ..matrix.algebra.eigenbasis import eigenbasis, followed, off_diagonal
from ..matrix.algebra.kronecker import mode_grams, rotate
from ..matrix.batch.batches import joined
from ..matrix.batch.phases import refreshed
from ..matrix.batch.refresh import Refresh
from ..matrix.batch.together import Unit, together
from .block_state import by_axis, fields, identities, with_fields, zero_unless
from .own_norm import Insides, forms, in_basis
from .tensors import Tensors


class Basis(NamedTuple):
    """State for one axis of the blocks of one tensor; the first axes are `[*batch, *counts]`."""

    statistics: jax.Array  # [..., b, b]: mean of Gram matrices
    vectors: jax.Array  # [..., b, b]: the eigenbasis, in columns


def new_basis(scalars: jax.Array, size: int) -> Basis:
    """The identity, with zero statistics; `scalars` are zeros, one for each block."""
    identity = identities(scalars, size)
    return Basis(jnp.zeros_like(identity), identity)


Bases = tuple[Basis | None, ...]
"""The state of a tensor, by axis."""


class Moments(NamedTuple):
    """State of a tensor without its bases, in blocks in the eigenbasis."""

    mu: jax.Array
    nu: jax.Array


class Step(NamedTuple):
    """One step for blocks and their bases; its fields are hyperparameters and facts about this step."""

    b1: Any
    b2: Any
    statistics_b2: Any
    eps: Any
    moves: jax.Array
    correction: jax.Array
    learns: jax.Array | None  # whether statistics are updated; None for always

    def __call__(self, kind: Any, carry: Any, vectors: Sequence[jax.Array]) -> Any:
        """Direction, moments and statistics for gradients, moments and statistics."""
        (order, axes, summed), (blocks, mu, nu, statistics) = kind, carry
        usable, seen = is_usable(blocks, tuple(range(-order, 0)), summed), wide(blocks)
        turn = by_axis(vectors, axes, order)
        rotated = without_rounding(rotate(seen, turn, back=True), seen, axes, order)
        rotated = zero_unless(usable, rotated)
        new_mu = jnp.where(self.moves, lerp(rotated, mu, self.b1), cast(mu, seen.dtype))
        new_nu = jnp.where(self.moves, lerp(jnp.square(rotated), nu, self.b2), cast(nu, seen.dtype))
        adam = new_mu / (jnp.sqrt(new_nu) + jnp.asarray(self.eps, new_nu.dtype))
        adam = jnp.where(self.moves, adam * self.correction.astype(adam.dtype), 0)

        def learned(statistics: Sequence[jax.Array]) -> list[jax.Array]:
            grams = jax.lax.psum(mode_grams(seen, axes, order), summed)
            return [
                jnp.where(usable[..., None, None], new, old)
                for new, old in zip(
                    ema(grams, statistics, self.statistics_b2), statistics, strict=True
                )
            ]

        statistics = if_due(self.learns, learned, list(statistics))
        found = (rotate(adam, turn), new_mu, new_nu)
        return *cast_like(found, (blocks, mu, nu)), statistics


def stepped(
    tensors: Tensors,
    gradients: Sequence[jax.Array],
    moments: Sequence[Moments],
    bases: Sequence[Bases],
    step: Step,
    schedule: Refresh,
    count: jax.Array,
) -> tuple[list[jax.Array], list[Moments], list[Bases]]:
    """Directions, moments and bases after the gradients of this step; all in blocks."""
    vectors = [fields(each, "vectors") for each in bases]
    units = [
        Unit(
            (len(tensor.sizes), tensor.axes, tensor.summed),
            turn,
            (blocks, *old, fields(each, "statistics")),
            tensor.spread,
            is_whole=bool(tensor.summed),
        )
        for tensor, blocks, old, each, turn in zip(
            tensors, gradients, moments, bases, vectors, strict=True
        )
    ]
    found = together(units, step, any_axes=True)
    moments = [Moments(mu, nu) for _, mu, nu, _ in found]
    statistics = [new for *_, new in found]
    directions = [direction for direction, *_ in found]
    # They are turned by the old bases, which may be overwritten then.
    count = after(count, directions)
    moments, vectors = _refreshed(tensors, moments, vectors, statistics, step, schedule, count)
    bases = [
        with_fields(each, statistics=new, vectors=turn)
        for each, new, turn in zip(bases, statistics, vectors, strict=True)
    ]
    return directions, moments, bases


def norms(
    tensors: Tensors,
    gradients: Sequence[jax.Array],
    moments: Sequence[jax.Array],
    bases: Sequence[Bases],
    eps: Any,
) -> list[OwnNorm]:
    """The norms of blocks, by second moments in their bases; directions without any count as zero."""

    def norm(axes: Any, blocks: jax.Array, source: Any, insides: Insides) -> OwnNorm:
        vectors, nu = source
        turn = by_axis(vectors, axes, blocks.ndim - 1)
        root = jnp.sqrt(cast(nu, wide_dtype(nu.dtype, blocks.dtype)))
        weights = jnp.where(nu > 0, 1 / (root + jnp.asarray(eps, root.dtype)), 0)
        return in_basis(blocks, turn, weights, insides)

    kinds = [tensor.axes for tensor in tensors]
    sources = [(fields(each, "vectors"), nu) for each, nu in zip(bases, moments, strict=True)]
    return forms(tensors, gradients, kinds, sources, norm)


def _refreshed(
    tensors: Tensors,
    moments: Sequence[Moments],
    vectors: Sequence[Any],
    statistics: Sequence[Any],
    step: Step,
    schedule: Refresh,
    count: jax.Array,
) -> tuple[list[Moments], list[Any]]:
    """New bases, as their vectors, where they are due, and the moments in them."""
    moments, vectors = list(moments), list(vectors)
    turned = [at for at, tensor in enumerate(tensors) if tensor.axes]
    is_first, floor = count == 1, _floor(step.b1, step.b2)

    def new(axes: Any, carry: Any, statistics: Any) -> Any:
        first = lambda carry: (_by_size(eigenbasis, statistics), *carry[1:])
        return either(is_first, first, lambda old: _followed(axes, old, statistics, floor), carry)

    units = [
        Unit(tensors[at].axes, statistics[at], (vectors[at], *moments[at]), tensors[at].spread)
        for at in turned
    ]
    due = lambda phase: is_first | schedule.follows(count, phase)
    need = schedule.by_need(count, _off, is_first)
    found = refreshed(units, new, schedule.phases, due, need=need)
    for at, (turn, mu, nu) in zip(turned, found, strict=True):
        moments[at], vectors[at] = Moments(mu, nu), turn
    return moments, vectors


def _floor(b1: Any, b2: Any) -> Any:
    r"""The least ratio of Adam's second moment to the square of the first.

    With the same gradients in both, Cauchy–Schwarz gives :math:`m^2 \le C^2 v`,

    .. math:: C^2 = \frac{(1 - \beta_1)^2}{(1 - \beta_2)(1 - \beta_1^2 / \beta_2)}

    if :math:`\beta_1^2 < \beta_2`; otherwise there is no such bound, and this is zero.
    """
    return jnp.maximum((1 - b2) * (1 - b1 * b1 / jnp.maximum(b2, 1e-30)), 0) / (1 - b1) ** 2


def _followed(axes: Any, carry: Any, statistics: Sequence[jax.Array], floor: Any) -> Any:
    """All bases after a QR step: the first moment is rotated into them, the second one permuted.

    The second moment is still zero in some directions of the new basis, such as those of a row without
    gradients so far. The first may have a component there, which would be divided by almost zero. So
    the second is raised to the least value that the first allows (`_floor`).
    """
    vectors, mu, nu = carry
    found = _by_size(functools.partial(followed, sort=True), statistics, vectors)
    new, permuted = [basis for basis, _ in found], nu
    for axis, (_, columns) in zip(axes, found, strict=True):
        index = columns.reshape(
            -1, *(columns.shape[1] if at == axis else 1 for at in range(mu.ndim - 1))
        )
        permuted = jnp.take_along_axis(permuted, index, axis=1 + axis)
    mean = cast(mu, wide_dtype(mu.dtype, *(basis.dtype for basis in vectors)))
    turned = without_rounding(_turned(axes, mean, vectors, new), mean, axes, mean.ndim - 1)
    proven = jnp.square(turned) * jnp.asarray(floor, turned.dtype)
    raised = jnp.maximum(cast(permuted, proven.dtype), proven)
    return new, *cast_like((turned, raised), (mu, nu))


def _off(_: Any, carry: Any, statistics: Sequence[jax.Array]) -> jax.Array:
    """The misfit of the axis with the worst basis."""
    vectors, *_ = carry
    return functools.reduce(jnp.maximum, _by_size(off_diagonal, statistics, vectors))


def _turned(
    axes: Sequence[int], x: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array]
) -> jax.Array:
    """Blocks moved from old bases to new ones, by products of both bases where that is cheaper."""
    order, sizes = x.ndim - 1, [basis.shape[-1] for basis in old]

    if sum(size**3 for size in sizes) > math.prod(x.shape[1:]) * sum(sizes):
        straight = rotate(x, by_axis(old, axes, order))
        return rotate(straight, by_axis(new, axes, order), back=True)
    both = _by_size(lambda new, old: rotate(old, [new, None], back=True), new, old)
    return rotate(x, by_axis(both, axes, order))


def without_rounding(
    rotated: jax.Array, blocks: jax.Array, axes: Sequence[int], order: int
) -> jax.Array:
    """Rotated blocks `[..., *sizes]`, with zeros for mere rounding errors of other elements.

    Adam divides by the root of the square, so a rounding error would look like an ordinary step.
    """
    inside = tuple(range(-order, 0))
    sizes = blocks.shape[-order:] if order else ()
    square = jnp.sum(jnp.square(blocks), axis=inside, keepdims=True)
    longest = max((sizes[axis] for axis in axes), default=0)
    eps = 32 * float(jnp.finfo(blocks.dtype).eps)
    bound = eps * jnp.sqrt(square * (longest / max(1, math.prod(sizes))))
    return jnp.where(jnp.abs(rotated) > bound, rotated, 0)


def _by_size(function: Callable[..., Any], *stacks: Sequence[jax.Array]) -> list[Any]:
    """`function` of stacks of matrices; those of equal size form one batch."""
    found: dict[int, Any] = {}
    for size in {x.shape[-1]: None for x in stacks[0]}:
        members = [at for at, x in enumerate(stacks[0]) if x.shape[-1] == size]
        parts = joined(function, *([stack[at] for at in members] for stack in stacks))
        found.update(zip(members, parts, strict=True))
    return [found[at] for at in range(len(stacks[0]))]
