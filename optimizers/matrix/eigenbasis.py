r"""Eigenbases of factors, followed by one QR step at a time.

A new eigendecomposition of a statistic that has hardly changed is wasteful, and its vectors come in any
order and sign. One step of orthogonal iteration, :math:`Q \leftarrow \operatorname{qr}(S Q)`, moves the
old basis towards the new one; what is kept in the basis moves along.
"""

import jax
import jax.numpy as jnp

from .lapack import for_each_matrix
from .roots import multiply


def eigenbasis(statistics_KxNxN: jax.Array) -> jax.Array:
    """The eigenvectors as columns, of the largest eigenvalue first.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.eigenbasis import eigenbasis
      >>> abs(eigenbasis(jnp.diag(jnp.array([1.0, 2.0]))[None])).tolist()
      [[[0.0, 1.0], [1.0, 0.0]]]
    """
    tiny = 1e-30 * jnp.eye(statistics_KxNxN.shape[-1], dtype=statistics_KxNxN.dtype)[None]
    lifted = statistics_KxNxN + tiny
    vectors = for_each_matrix(lambda x: jnp.linalg.eigh(x, symmetrize_input=False)[1], lifted)
    return _or_identity(vectors[..., ::-1])


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
      >>> from ravine.optimizers.matrix.eigenbasis import followed
      >>> basis, order = followed(jnp.diag(jnp.array([1.0, 2.0]))[None], jnp.eye(2)[None], sort=True)
      >>> abs(basis).tolist(), order.tolist()
      ([[[0.0, 1.0], [1.0, 0.0]]], [[1, 0]])
    """
    moved = multiply(statistics_KxNxN, basis_KxNxN)
    order = jnp.broadcast_to(jnp.arange(moved.shape[-1])[None], moved.shape[:2])
    if sort:
        order = jnp.argsort(jnp.sum(basis_KxNxN * moved, axis=1), axis=1, descending=True)
        moved = jnp.take_along_axis(moved, order[:, None, :], axis=2)
    found = for_each_matrix(lambda x: jnp.linalg.qr(x)[0], moved)
    usable = jnp.all(jnp.isfinite(found), axis=(1, 2))
    identity = jnp.arange(moved.shape[-1])[None]
    return (
        jnp.where(usable[:, None, None], found, basis_KxNxN),
        jnp.where(usable[:, None], order, identity),
    )


def _or_identity(vectors: jax.Array) -> jax.Array:
    usable = jnp.all(jnp.isfinite(vectors), axis=(1, 2))[:, None, None]
    return jnp.where(usable, vectors, jnp.eye(vectors.shape[-1], dtype=vectors.dtype)[None])
