r"""SOAP: Adam in the eigenbasis of Shampoo's factors, and what follows from it.

What the authors' code does, point by point, and so does this:

- The first gradient only sets the factors and their bases; no parameter moves, no decay.
- A gradient never preconditions itself: statistics take it in after the step.
- Both moments live in the rotated basis. At a refresh the first is rotated into the new one; the second
  is only *permuted* along with the columns of the basis, never rotated: squares cannot be.
- The basis is refreshed by one QR step (`matrix/eigenbasis.py`), its columns sorted beforehand.
- Epsilon is added to the root of the second moment as it is; both bias corrections count from the second
  step on and scale the learning rate.

One thing differs: the authors decay the parameters after the step, which multiplies the step by
:math:`1 - \eta\lambda`; here decay is a link of its own, as in AdamW.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._arithmetic import bias_correction, cast, increment, lerp, wide
from ._blocking import Blocking, Sides, blockings_of, check_blocking
from ._by_role import by_role
from ._checks import check_decay_rates, check_non_negative
from ._matrices import Axes
from ._tensors import blocks_like, factors_like, finite_blocks, identities
from ._transformation import transformation
from .decay import Mask
from .matrix.batching import joined
from .matrix.distribute import per_shard, total
from .matrix.eigenbasis import eigenbasis, followed
from .matrix.kronecker import mode_gram, rotate
from .matrix.refresh import Refresh, refreshed
from .matrix.shards import flat_axes, reshape
from .matrix.together import Unit, together
from .matrix_scale import Scale, scale_by_matrix_shape
from .orthogonal import orthogonalize
from .roles import COMMON_RULES, MATRIX_ROLES, Role, Rules, axes_of_path
from .shampoo import SHAMPOO_ROLES


class Basis(NamedTuple):
    """What is kept for one axis of the blocks of one tensor; the first axes are `[L, *counts]`."""

    statistics: jax.Array  # [..., b, b]: mean of Gram matrices
    vectors: jax.Array  # [..., b, b]: the eigenbasis, in columns


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`."""

    count: jax.Array  # int32 scalar, updates made so far, the first without effect included
    mu: Any  # like params: a tuple (tensors) of blocks, the mean of gradients in the eigenbasis
    nu: Any  # likewise: the mean of their squares
    bases: Any  # like params: a tuple (tensors) of tuples (axes) of Basis, or None without one


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    every: int = 10,
    staggered: bool = False,
    block: int | None = None,
    limit: int = 10_000,
    sides: Sides = "both",
    precondition_vectors: bool = False,
    axes: Axes | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""The direction of SOAP.

    With the bases :math:`Q_L, Q_R` of the last refresh and :math:`k = t - 1`,

    .. math::
        G' &= Q_L^\top G Q_R, \qquad M' \leftarrow \beta_1 M' + (1 - \beta_1) G', \qquad
        V \leftarrow \beta_2 V + (1 - \beta_2) G'^2 \\
        u &= \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \,
            Q_L \frac{M'}{\sqrt{V} + \epsilon} Q_R^\top \\
        L &\leftarrow \beta_s L + (1 - \beta_s) GG^\top, \qquad
        Q_L \leftarrow \operatorname{qr}(L Q_L) \text{ every } T \text{ steps}

    and likewise for the columns, or every axis of a tensor. The first update is zero.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second, in [0, 1).
      eps: added to the root of the second moment.
      shampoo_b2: decay rate of the factors' statistics; ``None`` takes `b2`.
      every: T.
      staggered: refresh the bases of different leaves on different steps of the period.
      block: bound on the size of bases; longer axes are cut. ``None`` does not cut.
      limit: axes longer than this get no basis, and are not cut.
      sides: ``"both"``, ``"rows"``, ``"columns"`` or ``"smaller"``.
      precondition_vectors: whether leaves with one axis get a basis too.
      axes: which axes of a leaf are rows and columns; ``None`` gives every axis of a leaf a basis.
      mu_dtype: dtype of the first moment; by default at least float32.
      nu_dtype: dtype of the second moment; likewise.

    Raises:
      ValueError: for values out of range.

    Source: Vyas et al., 2024, https://arxiv.org/abs/2409.11321; nikhilvyas/SOAP, ``soap.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, g = ravine.scale_by_soap(), jnp.diag(jnp.array([3.0, 4.0]))
      >>> state = tx.init(jnp.zeros((2, 2)))
      >>> _, state = tx.update(g, state)  # sets the bases only
      >>> tx.update(g, state)[0].round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)
    check_non_negative(eps=eps)
    if shampoo_b2 is not None:
        check_decay_rates(shampoo_b2=shampoo_b2)
    check_blocking(block, limit, sides)
    schedule = Refresh(every, None, staggered)
    statistics_b2 = b2 if shampoo_b2 is None else shampoo_b2

    def blockings(tree: Any) -> list[Blocking]:
        return blockings_of(tree, axes, block, limit, sides, vectors=precondition_vectors)

    def init(params: optax.Params) -> ScaleBySoapState:
        found = blockings(params)
        return ScaleBySoapState(
            count=jnp.zeros([], jnp.int32),
            mu=blocks_like(params, found, mu_dtype),
            nu=blocks_like(params, found, nu_dtype),
            bases=factors_like(params, found, _basis),
        )

    def body(
        updates: optax.Updates, state: ScaleBySoapState, found: Sequence[Blocking]
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        structure, count = jax.tree.structure(updates), increment(state.count)
        k = jnp.maximum(count - 1, 1)
        step = _Step(
            b1=b1,
            b2=b2,
            statistics_b2=statistics_b2,
            eps=eps,
            moves=count > 1,
            correction=jnp.sqrt(bias_correction(b2, k)) / bias_correction(b1, k),
        )
        gradients = jax.tree.leaves(updates)
        kept = zip(
            *(structure.flatten_up_to(x) for x in (state.mu, state.nu, state.bases)), strict=True
        )
        leaves = [
            [
                _Piece(blocks, mu, nu, bases)
                for blocks, mu, nu, bases in zip(blocking.to_blocks(g), *leaf, strict=True)
            ]
            for g, blocking, leaf in zip(gradients, found, kept, strict=True)
        ]
        leaves = _refreshed(_stepped(leaves, found, step), found, schedule, count)
        directions = [
            blocking.from_blocks([piece.blocks for piece in leaf])
            for blocking, leaf in zip(found, leaves, strict=True)
        ]
        mu, nu, bases = (
            jax.tree.unflatten(
                structure, [tuple(getattr(piece, name) for piece in leaf) for leaf in leaves]
            )
            for name in ("mu", "nu", "bases")
        )
        state = ScaleBySoapState(count, mu, nu, bases)
        return jax.tree.unflatten(structure, directions), state

    on_mesh = per_shard(body, init)

    def update(
        updates: optax.Updates, state: ScaleBySoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params
        return on_mesh(updates, state, blockings(updates))

    return transformation(init, update)


def _basis(scalars: jax.Array, size: int) -> Basis:
    identity = identities(scalars, size)
    return Basis(jnp.zeros_like(identity), identity)


class _Piece(NamedTuple):
    """One tensor of a leaf, in blocks."""

    blocks: jax.Array  # the gradient, and after the step the direction in its place
    mu: jax.Array
    nu: jax.Array
    bases: tuple[Basis | None, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Those with a basis."""
        return tuple(axis for axis, basis in enumerate(self.bases) if basis is not None)

    def flat(self, x: jax.Array) -> jax.Array:
        """Blocks `[L, *counts, ...]`, or what belongs to them, as one batch."""
        return flat_axes(x, self.blocks.ndim - len(self.bases))

    def every(self, name: str) -> list[jax.Array]:
        """A field of all bases, in batches."""
        return [self.flat(getattr(self.bases[axis], name)) for axis in self.axes]

    def with_bases(self, name: str, values: Sequence[jax.Array]) -> tuple[Basis | None, ...]:
        """The bases with one of their fields replaced."""
        left = iter(values)
        return tuple(
            basis and basis._replace(**{name: reshape(next(left), basis.vectors.shape)})
            for basis in self.bases
        )


class _Step(NamedTuple):
    """What one step does with blocks and their bases; numbers, and what is known of this step."""

    b1: Any
    b2: Any
    statistics_b2: Any
    eps: Any
    moves: jax.Array
    correction: jax.Array

    def __call__(self, kind: Any, carry: Any, vectors: Sequence[jax.Array]) -> Any:
        """Direction, moments and statistics for gradients, moments and statistics."""
        (order, axes, summed), (blocks, mu, nu, statistics) = kind, carry
        usable, seen = finite_blocks(wide(blocks), order, summed)
        turn: list[jax.Array | None] = [None] * order
        for axis, basis in zip(axes, vectors, strict=True):
            turn[axis] = basis
        rotated = rotate(seen, turn, back=True)
        new_mu = jnp.where(self.moves, lerp(rotated, mu, self.b1), wide(mu))
        new_nu = jnp.where(self.moves, lerp(jnp.square(rotated), nu, self.b2), wide(nu))
        adam = new_mu / (jnp.sqrt(new_nu) + jnp.asarray(self.eps, new_nu.dtype))
        adam = jnp.where(self.moves, adam * self.correction.astype(adam.dtype), 0)
        learned = []
        for axis, old in zip(axes, statistics, strict=True):
            new = lerp(total(mode_gram(seen, axis, order), summed), old, self.statistics_b2)
            learned.append(jnp.where(usable[:, None, None], new, old))
        direction = cast(rotate(adam, turn), blocks.dtype)
        return direction, cast(new_mu, mu.dtype), cast(new_nu, nu.dtype), learned


def _stepped(
    leaves: Sequence[Sequence[_Piece]], found: Sequence[Blocking], step: _Step
) -> list[list[_Piece]]:
    """The leaves with directions for gradients, and with moments and statistics that have seen them."""
    units = [
        Unit(
            (len(piece.bases), piece.axes, blocking.summed),
            piece.every("vectors"),
            (*map(piece.flat, piece[:3]), piece.every("statistics")),
            blocking.shards,
            is_whole=bool(blocking.summed),
        )
        for leaf, blocking in zip(leaves, found, strict=True)
        for piece in leaf
    ]
    done = iter(together(units, step))

    def one(piece: _Piece) -> _Piece:
        *arrays, statistics = next(done)
        blocks, mu, nu = (reshape(x, old.shape) for x, old in zip(arrays, piece[:3], strict=True))
        return _Piece(blocks, mu, nu, piece.with_bases("statistics", statistics))

    return [[one(piece) for piece in leaf] for leaf in leaves]


def _refreshed(
    leaves: list[list[_Piece]], found: Sequence[Blocking], schedule: Refresh, count: jax.Array
) -> list[list[_Piece]]:
    """The leaves with new bases where they are due, and the moments in them."""
    places = [
        (at, index)
        for at, leaf in enumerate(leaves)
        for index, piece in enumerate(leaf)
        if piece.axes
    ]

    def unit(at: int, index: int, *, moments: bool) -> Unit:
        piece = leaves[at][index]
        vectors = piece.every("vectors")
        carry = (vectors, piece.flat(piece.mu), piece.flat(piece.nu)) if moments else vectors
        return Unit(piece.axes, piece.every("statistics"), carry, found[at].shards)

    def first(_: Any, vectors: Any, statistics: Any) -> Any:
        del vectors
        return _by_size(eigenbasis, statistics)

    units = [unit(*place, moments=False) for place in places]
    for (at, index), vectors in zip(
        places, refreshed(units, first, 1, lambda _: count == 1), strict=True
    ):
        piece = leaves[at][index]
        leaves[at][index] = piece._replace(bases=piece.with_bases("vectors", vectors))
    units = [unit(*place, moments=True) for place in places]
    due = lambda phase: schedule.follows(count, phase)
    for (at, index), (vectors, mu, nu) in zip(
        places, refreshed(units, _followed, schedule.phases, due), strict=True
    ):
        piece = leaves[at][index]
        leaves[at][index] = piece._replace(
            mu=reshape(mu, piece.mu.shape),
            nu=reshape(nu, piece.nu.shape),
            bases=piece.with_bases("vectors", vectors),
        )
    return leaves


def _followed(axes: Any, carry: Any, statistics: Sequence[jax.Array]) -> Any:
    """All bases a QR step on: the first moment rotated into them, the second one permuted."""
    vectors, mu, nu = carry
    follow = functools.partial(followed, sort=True)
    found = _by_size(follow, statistics, vectors)
    both = [[None] * (mu.ndim - 1) for _ in range(2)]
    permuted = nu
    for axis, old, (new, columns) in zip(axes, vectors, found, strict=True):
        both[0][axis], both[1][axis] = old, new
        index = columns.reshape(
            -1, *(columns.shape[1] if at == axis else 1 for at in range(mu.ndim - 1))
        )
        permuted = jnp.take_along_axis(permuted, index, axis=1 + axis)
    moved = rotate(rotate(wide(mu), both[0]), both[1], back=True)
    return [new for new, _ in found], cast(moved, mu.dtype), permuted


def _by_size(function: Callable[..., Any], *stacks: Sequence[jax.Array]) -> list[Any]:
    """`function` of stacks of matrices, those of one size as one batch."""
    found: dict[int, Any] = {}
    for size in {x.shape[-1]: None for x in stacks[0]}:
        members = [at for at, x in enumerate(stacks[0]) if x.shape[-1] == size]
        parts = joined(function, *([stack[at] for at in members] for stack in stacks))
        found.update(zip(members, parts, strict=True))
    return [found[at] for at in range(len(stacks[0]))]


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    every: int = 10,
    staggered: bool = False,
    block: int | None = None,
    limit: int = 10_000,
    sides: Sides = "both",
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Mask | None = None,
    rules: Rules = COMMON_RULES,
    soap_roles: Collection[Role] = SHAMPOO_ROLES,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    r"""SOAP for matrices, embeddings and heads, another optimizer for everything else.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, shampoo_b2, every, staggered, block, limit, sides, mu_dtype, nu_dtype: as for
        :func:`scale_by_soap`.
      weight_decay: multiplied by the learning rate; also that of the default fallback.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      rules: role rules; by default those for Ravine's, NNX's and Linen's names.
      soap_roles: the roles that SOAP takes; all need rows and columns.
      fallback: the optimizer of all other parameters, complete with its learning rate; by default
        AdamW at the same learning rate.

    Raises:
      ValueError: for values out of range, and at `init` for parameters that no rule covers or that are
        no matrices but shall be.

    Source: as :func:`scale_by_soap`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.soap(3e-3, every=5)
      >>> updates, state = tx.update(params, tx.init(params), params)
    """
    direction = scale_by_soap(
        b1,
        b2,
        eps,
        shampoo_b2=shampoo_b2,
        every=every,
        staggered=staggered,
        block=block,
        limit=limit,
        sides=sides,
        axes=lambda path: axes_of_path(path, rules),
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return by_role(
        "soap",
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=soap_roles,
        fallback=fallback,
    )


def soap_muon(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    every: int = 10,
    staggered: bool = False,
    method: Callable[[jax.Array], jax.Array] | None = None,
    scale: Scale = "moonlight",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    rules: Rules = COMMON_RULES,
    matrix_roles: Collection[Role] = MATRIX_ROLES,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    r"""SOAP's direction, orthogonalized: ``scale_by_soap → orthogonalize → scale_by_matrix_shape``.

    Args:
      learning_rate: a number or a schedule; with ``"moonlight"`` one that suits Muon and AdamW.
      b1, b2, eps, shampoo_b2, every, staggered: as for :func:`scale_by_soap`.
      method: maps a batch of matrices to their polar factors; by default ``NewtonSchulz()``.
      scale: the factor of a matrix's shape, as for :func:`muon`.
      weight_decay: multiplied by the learning rate; also that of the default fallback.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      rules: role rules.
      matrix_roles: the roles it takes.
      fallback: the optimizer of all other parameters; by default AdamW at the same learning rate.

    Source: the records of modded-nanogpt's optimizer track, 2026 (SOAP-Muon); marin #6082.

    Example:
      >>> import ravine
      >>> tx = ravine.soap_muon(0.01, weight_decay=0.1)
    """

    def axes(path: str) -> Any:
        return axes_of_path(path, rules)

    direction = optax.chain(
        scale_by_soap(
            b1,
            b2,
            eps,
            shampoo_b2=shampoo_b2,
            every=every,
            staggered=staggered,
            axes=axes,
        ),
        orthogonalize(method, axes=axes),
        scale_by_matrix_shape(scale, axes=axes),
    )
    return by_role(
        "soap_muon",
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=matrix_roles,
        fallback=fallback,
    )
