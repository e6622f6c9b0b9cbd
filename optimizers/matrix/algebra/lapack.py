"""LAPACK for batches: eigendecompositions and QR of many matrices.

Outside `jax.shard_map` the compiler gathers the operands of LAPACK and similar calls onto every device,
and under an `Explicit` mesh they raise (jax #33230); optimizers call this inside `per_shard`.

On CPU the matrices go to LAPACK one by one. Given a batch, jaxlib (0.10 to 0.12) splits it over XLA's
thread pool and waits inside that same pool: when as many such calls run at once as there are threads,
from two independent places of a program or from two devices, they wait for each other forever.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def for_each_matrix(function: Callable[[jax.Array], Any], batch: jax.Array) -> Any:
    """``function(batch)``, on CPU one matrix at a time.

    Args:
      function: maps `[K, n, m]`, matrix by matrix, to arrays `[K, ...]`.
      batch: `[K, n, m]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.lapack import for_each_matrix
      >>> for_each_matrix(jnp.linalg.eigvalsh, jnp.eye(2)[None])
      Array([[1., 1.]], dtype=float32)
    """

    def one_by_one(batch: jax.Array) -> Any:
        found = jax.lax.map(lambda matrix: function(matrix[None]), batch)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), found)

    return jax.lax.platform_dependent(batch, cpu=one_by_one, default=function)


def eigh(symmetric_KxNxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, smallest first, and eigenvectors as columns."""
    one = lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False))
    return for_each_matrix(one, symmetric_KxNxN)
