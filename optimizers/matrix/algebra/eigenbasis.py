r"""Eigenbases of factors, followed by one QR step at a time.

A new eigendecomposition of a statistic that has hardly changed is wasteful, and its vectors come in any
order and sign. One step of orthogonal iteration, :math:`Q \leftarrow \operatorname{qr}(S Q)`, moves the
old basis towards the new one; what is kept in the basis moves along.

Statistics are singular more often than not: in directions that no gradient has had a part in,
eigenvectors are whatever rounding makes of them, another choice on every machine and in every program,
and the next gradient may well point there. So what is zero up to rounding is not left to chance: such
columns of a basis stay what they were, or come from the identity's.
"""

import math

import jax
import jax.numpy as jnp

from .lapack import for_each_matrix
from .roots import multiply


def eigenbasis(statistics_KxNxN: jax.Array) -> jax.Array:
    """The eigenvectors as columns, of the largest eigenvalue first.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import eigenbasis
      >>> abs(eigenbasis(jnp.diag(jnp.array([1.0, 2.0]))[None])).tolist()
      [[[0.0, 1.0], [1.0, 0.0]]]
    """
    tiny = 1e-30 * jnp.eye(statistics_KxNxN.shape[-1], dtype=statistics_KxNxN.dtype)[None]
    lifted = statistics_KxNxN + tiny
    found = for_each_matrix(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)), lifted)
    values, vectors = (x[..., ::-1] for x in found)
    vectors = _completed_in_turn(vectors, _above_rounding(values))
    usable = jnp.all(jnp.isfinite(vectors), axis=(1, 2))[:, None, None]
    return jnp.where(usable, vectors, jnp.eye(vectors.shape[-1], dtype=vectors.dtype)[None])


def followed(
    statistics_KxNxN: jax.Array, basis_KxNxN: jax.Array, *, sort: bool
) -> tuple[jax.Array, jax.Array]:
    """The basis one QR step on, and the order `[K, N]` its old columns were brought into.

    Args:
      statistics_KxNxN: symmetric positive semi-definite.
      basis_KxNxN: orthogonal; kept as it is where the step gives anything not finite.
      sort: bring the columns into the order of their Rayleigh quotients first, largest in front.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import followed
      >>> basis, order = followed(jnp.diag(jnp.array([1.0, 2.0]))[None], jnp.eye(2)[None], sort=True)
      >>> abs(basis).tolist(), order.tolist()
      ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])
    """
    moved, columns = multiply(statistics_KxNxN, basis_KxNxN), basis_KxNxN
    quotients = jnp.sum(columns * moved, axis=1)
    identity = jnp.arange(moved.shape[-1])[None]
    order = jnp.broadcast_to(identity, moved.shape[:2])
    if sort:
        order = jnp.argsort(quotients, axis=1, descending=True)
        quotients = jnp.take_along_axis(quotients, order, axis=1)
        moved, columns = (
            jnp.take_along_axis(x, order[:, None, :], axis=2) for x in (moved, columns)
        )
    known = _above_rounding(quotients)
    # As long as the longest, so that a column that stays does not pass for one that is lost.
    longest = jnp.max(jnp.abs(quotients), axis=1, initial=0)
    kept = columns * jnp.where(longest > 0, longest, 1)[:, None, None]
    moved = jnp.where(known[:, None], moved, kept)

    found = _orthonormal(moved, ranked=sort)
    usable = jnp.all(jnp.isfinite(found), axis=(1, 2))
    return (
        jnp.where(usable[:, None, None], found, basis_KxNxN),
        jnp.where(usable[:, None], order, identity),
    )


def off_diagonal(statistics_KxNxN: jax.Array, basis_KxNxN: jax.Array) -> jax.Array:
    r"""`[K]`: how much of :math:`Q^\top S Q` is off its diagonal, as a part of the whole.

    Frobenius norms, to about a thousandth: as Q is orthogonal, one product is enough. It is the
    criterion of Eschenhagen et al., 2025, https://arxiv.org/abs/2506.03595.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import off_diagonal
      >>> round(float(off_diagonal(jnp.array([[[3.0, 4.0], [4.0, 3.0]]]), jnp.eye(2)[None])[0]), 2)
      0.8
    """
    largest = jnp.max(jnp.abs(statistics_KxNxN), axis=(1, 2), keepdims=True)
    scaled = statistics_KxNxN / jnp.where(largest > 0, largest, 1)
    diagonal = jnp.sum(basis_KxNxN * multiply(scaled, basis_KxNxN), axis=1)
    whole = jnp.sum(jnp.square(scaled), axis=(1, 2))
    off = jnp.maximum(whole - jnp.sum(jnp.square(diagonal), axis=1), 0)
    return jnp.sqrt(off / jnp.where(whole > 0, whole, 1))


def _completed_in_turn(vectors_KxNxN: jax.Array, known_KxN: jax.Array) -> jax.Array:
    """`_completed`, everywhere but on CPU 32 matrices at a time.

    As one batch, the QR step behind an eigendecomposition makes XLA for TPU take half as much temporary
    memory again as all else in SOAP (LLaMA-2 70B on 512 chips: 0.91 GB, and 0.61 so).
    """

    def in_turn(vectors: jax.Array, known: jax.Array) -> jax.Array:
        one = lambda pair: _completed(pair[0][None], pair[1][None])[0]
        return jax.lax.map(one, (vectors, known), batch_size=32)

    return jax.lax.platform_dependent(vectors_KxNxN, known_KxN, cpu=_completed, default=in_turn)


def _completed(vectors_KxNxN: jax.Array, known_KxN: jax.Array) -> jax.Array:
    """The known columns, which come first, and behind them those of the identity that lie in them least.

    Chosen by their rows' lengths and in the order of the identity, so that nothing hangs on a sign.
    """
    size = known_KxN.shape[-1]
    first, missing = jnp.sum(known_KxN, axis=1, keepdims=True), jnp.sum(~known_KxN, axis=1)
    index = jnp.broadcast_to(jnp.arange(size)[None], known_KxN.shape)
    lengths = jnp.sum(jnp.where(known_KxN[:, None], jnp.square(vectors_KxNxN), 0), axis=2)
    rank = jnp.argsort(jnp.argsort(lengths, axis=1), axis=1)
    chosen = jnp.argsort(jnp.where(rank < missing[:, None], index, size + index), axis=1)
    ours = jnp.take_along_axis(chosen, jnp.maximum(index - first, 0), axis=1)
    identity = (ours[:, None] == jnp.arange(size)[None, :, None]).astype(vectors_KxNxN.dtype)
    columns = jnp.where(known_KxN[:, None], vectors_KxNxN, identity)
    return jnp.where(known_KxN[:, None], vectors_KxNxN, _orthonormal(columns, ranked=False))


def _above_rounding(values_KxN: jax.Array) -> jax.Array:
    """Which values of a matrix are more than rounding of the largest one."""
    bound = 8 * math.sqrt(values_KxN.shape[-1]) * float(jnp.finfo(values_KxN.dtype).eps)
    return values_KxN > bound * jnp.max(values_KxN, axis=1, keepdims=True, initial=0)


def _orthonormal(columns_KxNxN: jax.Array, *, ranked: bool) -> jax.Array:
    """Q of their QR decomposition.

    If the columns are `ranked`, none that is a combination of those before it comes in front of one that
    is not; Householder's reflections end there, and from there on Q has the columns of the identity,
    reflected by those before. Otherwise rounding is what decides on them.
    """

    def one(x: jax.Array) -> jax.Array:
        packed, scales = jnp.linalg.qr(x, mode="raw")
        packed = jnp.swapaxes(packed, 1, 2)
        if ranked:
            lost = ~_above_rounding(jnp.abs(jnp.diagonal(packed, axis1=1, axis2=2)))
            scales = jnp.where(jnp.cumsum(lost, axis=1) > 0, 0, scales)
        return jax.lax.linalg.householder_product(packed, scales)

    return for_each_matrix(one, columns_KxNxN)
