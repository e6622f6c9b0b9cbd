r"""Eigenbases of factors, tracked by one QR step at a time.

A new eigendecomposition of statistics that have hardly changed is wasteful, and its vectors have
arbitrary order and sign. One step of orthogonal iteration, :math:`Q \leftarrow \operatorname{qr}(S Q)`,
moves the old basis towards the new one, and the state in that basis moves with it.

Statistics are singular more often than not: in directions without any gradient so far, eigenvectors are
determined by rounding alone and differ between machines and programs, and the next gradient may point
there. So directions that are zero up to rounding are not left to chance: such columns of a basis do not
change, or come from the identity.
"""

import math

import jax
import jax.numpy as jnp

from .lapack import eigh, for_each_matrix
from .roots import multiply


def eigenbasis(statistics_KxNxN: jax.Array) -> jax.Array:
    """The eigenvectors as columns, largest eigenvalue first.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import eigenbasis
      >>> abs(eigenbasis(jnp.diag(jnp.array([1.0, 2.0]))[None])).tolist()
      [[[0.0, 1.0], [1.0, 0.0]]]
    """
    tiny = 1e-30 * jnp.eye(statistics_KxNxN.shape[-1], dtype=statistics_KxNxN.dtype)[None]
    values, vectors = (x[..., ::-1] for x in eigh(statistics_KxNxN + tiny))
    vectors = _completed_in_turn(vectors, _above_rounding(values))
    usable = jnp.all(jnp.isfinite(vectors), axis=(1, 2))[:, None, None]
    return jnp.where(usable, vectors, jnp.eye(vectors.shape[-1], dtype=vectors.dtype)[None])


def followed(
    statistics_KxNxN: jax.Array, basis_KxNxN: jax.Array, *, sort: bool
) -> tuple[jax.Array, jax.Array]:
    """The basis after one QR step, and the order `[K, N]` into which its old columns were sorted.

    Args:
      statistics_KxNxN: symmetric positive semi-definite.
      basis_KxNxN: orthogonal; not changed where the step gives a non-finite value.
      sort: first sort the columns by their Rayleigh quotients, largest first.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import followed
      >>> basis, order = followed(jnp.diag(jnp.array([1.0, 2.0]))[None], jnp.eye(2)[None], sort=True)
      >>> abs(basis).tolist(), order.tolist()
      ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])
    """
    moved, columns = multiply(statistics_KxNxN, basis_KxNxN), basis_KxNxN
    quotients = _column_products(columns, moved)
    identity = jnp.arange(moved.shape[-1])[None]
    order = jnp.broadcast_to(identity, moved.shape[:2])
    if sort:
        order = jnp.argsort(quotients, axis=1, descending=True)
        quotients = jnp.take_along_axis(quotients, order, axis=1)
        moved, columns = (
            jnp.take_along_axis(x, order[:, None, :], axis=2) for x in (moved, columns)
        )
    known = _above_rounding(quotients)
    # As long as the longest, so that a column to keep does not look like a lost one.
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
    r"""`[K]`: how much of :math:`Q^\top S Q` is off its diagonal, as a fraction of the whole.

    In Frobenius norms, accurate to about a thousandth: since Q is orthogonal, one product is enough. It
    is the criterion of Eschenhagen et al., 2025, https://arxiv.org/abs/2506.03595.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.eigenbasis import off_diagonal
      >>> round(float(off_diagonal(jnp.array([[[3.0, 4.0], [4.0, 3.0]]]), jnp.eye(2)[None])[0]), 2)
      0.8
    """
    largest = jnp.max(jnp.abs(statistics_KxNxN), axis=(1, 2), keepdims=True)
    scaled = statistics_KxNxN / jnp.where(largest > 0, largest, 1)
    diagonal = _column_products(basis_KxNxN, multiply(scaled, basis_KxNxN))
    whole = jnp.sum(jnp.square(scaled), axis=(1, 2))
    off = jnp.maximum(whole - jnp.sum(jnp.square(diagonal), axis=1), 0)
    return jnp.sqrt(off / jnp.where(whole > 0, whole, 1))


def _completed_in_turn(vectors_KxNxN: jax.Array, known_KxN: jax.Array) -> jax.Array:
    """`_completed`, on all platforms except CPU 32 matrices at a time.

    In one batch, the QR step after an eigendecomposition raises the temporary memory of SOAP in XLA for
    TPU by half (LLaMA-2 70B on 512 chips: 0.91 GB, instead of 0.61 in parts).
    """

    def in_turn(vectors: jax.Array, known: jax.Array) -> jax.Array:
        one = lambda pair: _completed(pair[0][None], pair[1][None])[0]
        return jax.lax.map(one, (vectors, known), batch_size=32)

    return jax.lax.platform_dependent(vectors_KxNxN, known_KxN, cpu=_completed, default=in_turn)


def _completed(vectors_KxNxN: jax.Array, known_KxN: jax.Array) -> jax.Array:
    """The known columns first, then those columns of the identity that overlap least with them.

    They are chosen by their rows' lengths, in the order of the identity, so that nothing depends on a
    sign.
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


def _column_products(left_KxNxN: jax.Array, right_KxNxN: jax.Array) -> jax.Array:
    """`[K, N]`: the inner products of their columns.

    XLA for CPU takes a hundred times as long for `jnp.sum` of their product if K is one.
    """
    return jnp.einsum("kij,kij->kj", left_KxNxN, right_KxNxN, precision="highest")


def _above_rounding(values_KxN: jax.Array) -> jax.Array:
    """Which values of a matrix are more than rounding of the largest one."""
    bound = 8 * math.sqrt(values_KxN.shape[-1]) * float(jnp.finfo(values_KxN.dtype).eps)
    return values_KxN > bound * jnp.max(values_KxN, axis=1, keepdims=True, initial=0)


def _orthonormal(columns_KxNxN: jax.Array, *, ranked: bool) -> jax.Array:
    """Q of their QR decomposition.

    If the columns are `ranked`, those that are combinations of earlier ones come last; Householder's
    reflections end there, and the rest of Q are columns of the identity with the earlier reflections
    applied. Otherwise rounding decides them.
    """

    def one(x: jax.Array) -> jax.Array:
        packed, scales = jnp.linalg.qr(x, mode="raw")
        packed = jnp.swapaxes(packed, 1, 2)
        if ranked:
            lost = ~_above_rounding(jnp.abs(jnp.diagonal(packed, axis1=1, axis2=2)))
            scales = jnp.where(jnp.cumsum(lost, axis=1) > 0, 0, scales)
        return jax.lax.linalg.householder_product(packed, scales)

    return for_each_matrix(one, columns_KxNxN)
