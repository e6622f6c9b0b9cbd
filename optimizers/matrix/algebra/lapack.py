"""LAPACK for batches: eigendecompositions and QR of many matrices.

Outside `jax.shard_map` the compiler gathers the operands of LAPACK and similar calls onto every device,
and under an `Explicit` mesh they raise (jax #33230); optimizers call this inside `per_shard`.

On CPU the matrices go to LAPACK one by one. Given a batch, jaxlib (0.10 and 0.11.0) splits it over XLA's
thread pool and waits inside that same pool: when as many such calls run at once as there are threads,
from two independent places of a program or from two devices, they wait for each other forever. A call
with one matrix starts no other work and waits for nothing, so several of these may run side by side, and
do if OpenBLAS leaves the other cores to them: with ``OPENBLAS_NUM_THREADS=1``.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ....core.row_major import row_major

SIDE_BY_SIDE = 12
"""Calls in one turn of a loop. XLA (jaxlib 0.10) hands half of what is ready to another thread if that
is more than eight calls."""
LARGE = 2**14
"""Elements of a matrix from which on that takes less time than it costs to compile."""
VERY_LARGE = 2**20
"""Elements from which on a separate copy into LAPACK's layout and back, by columns, takes less time than
transposing in the kernels before and after."""


def for_each_matrix(function: Callable[[jax.Array], Any], batch: jax.Array) -> Any:
    """``function(batch)``, on CPU with one call for each matrix, under `jax.vmap` too.

    Args:
      function: maps `[K, n, m]`, matrix by matrix, to arrays `[K, ...]`.
      batch: `[K, n, m]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.lapack import for_each_matrix
      >>> for_each_matrix(jnp.linalg.eigvalsh, jnp.eye(2)[None])
      Array([[1., 1.]], dtype=float32)
    """

    def alone(matrix: jax.Array) -> Any:
        if matrix.size < VERY_LARGE:
            return function(matrix[None])
        return jax.tree.map(row_major, function(row_major(matrix[None])))

    # `jax.vmap` would make a batch of it again; and a function with a rule for that has derivatives in
    # forward mode only, with an unclear error in reverse mode.
    one = jax.custom_jvp(jax.custom_batching.sequential_vmap(alone))
    one.defjvp(lambda primals, tangents: jax.jvp(alone, primals, tangents))

    def one_by_one(batch: jax.Array) -> Any:
        each = lambda _, matrix: (None, one(matrix))
        _, found = jax.lax.scan(each, None, batch, unroll=_side_by_side(batch))
        return jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), found)

    return jax.lax.platform_dependent(batch, cpu=one_by_one, default=function)


def _side_by_side(batch: jax.Array) -> int:
    """How many matrices of a batch may be decomposed at the same time.

    With more OpenBLAS threads than one, calls side by side take longer than one after the other.
    """
    one_thread = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
    large = math.prod(batch.shape[1:]) >= LARGE
    return max(1, min(SIDE_BY_SIDE, batch.shape[0])) if one_thread and large else 1


def eigh(symmetric_KxNxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, smallest first, and eigenvectors as columns."""
    one = lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False))
    return for_each_matrix(one, symmetric_KxNxN)
