"""Linear algebra on the shards of a batch.

Outside `jax.shard_map` the compiler gathers what LAPACK and its kin work on onto every device, and
under an `Explicit` mesh they raise (jax #33230). Inside, every device works on what it holds.

On CPU the matrices go to LAPACK one by one. Given a batch, jaxlib (0.10 to 0.12) deals it to XLA's
thread pool and waits inside that same pool: as many such calls at once as there are threads, from two
independent places of a program or from two devices, wait for each other for ever.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .placement import Names, names_of, spec


def on_shards(function: Callable[[jax.Array], Any], batch: jax.Array) -> Any:
    """``function(batch)``, on each device's part of the first axis where that is sharded by type.

    Args:
      function: of `[K, n, m]`, matrix by matrix, to arrays `[K, ...]`.
      batch: under an `Explicit` mesh its type says how it is sharded; otherwise the compiler decides.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.shards import on_shards
      >>> on_shards(jnp.linalg.eigvalsh, jnp.eye(2)[None])
      Array([[1., 1.]], dtype=float32)
    """

    def one_by_one(batch: jax.Array) -> Any:
        found = jax.lax.map(lambda matrix: function(matrix[None]), batch)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), found)

    def local(batch: jax.Array) -> Any:
        return jax.lax.platform_dependent(batch, cpu=one_by_one, default=function)

    sharding = jax.typeof(batch).sharding
    if sharding.mesh.empty or not any(axis is not None for axis in sharding.spec):
        return local(batch)
    if any(axis is not None for axis in sharding.spec[1:]):
        raise ValueError(
            f"matrices of a batch must be whole on every device, but are sharded as {sharding.spec}; "
            "choose blocks that do not cross shards."
        )
    spec = PartitionSpec(sharding.spec[0])
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(batch)


def reshape(x: Any, shape: Sequence[int], names: Sequence[Names] | None = None) -> Any:
    """``x.reshape(shape)``, cut by mesh axes as it was.

    Args:
      x: a NumPy or JAX array.
      shape: of the result.
      names: by axis of the result, the mesh axes that cut it; by default those that cut the first axis
        still do, and no other axis may be cut.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.shards import reshape
      >>> reshape(jnp.ones((2, 6)), (2, 2, 3)).shape
      (2, 2, 3)
    """
    shape = tuple(shape)
    before = names_of(x)
    if x.shape == shape or not any(before):
        return x.reshape(shape)
    if names is None:
        if any(before[1:]):
            raise ValueError(
                f"an array of shape {x.shape} is cut by the mesh axes {before}, and only its batch axis "
                "may be here; keep rows and columns of matrices whole."
            )
        names = (before[0], *((),) * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=spec(names))


def flat_batch(matrices: jax.Array, size: int) -> jax.Array:
    """`[..., size, size]` as `[K, size, size]`."""
    return reshape(matrices, (math.prod(matrices.shape[:-2]), size, size))
