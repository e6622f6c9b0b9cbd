"""Reshapes of arrays that mesh axes cut."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .placement import Names, names_of, spec

Explicit = jax.sharding.AxisType.Explicit


def reshape(x: Any, shape: Sequence[int], names: Sequence[Names] | None = None) -> Any:
    """``x.reshape(shape)``, still cut by the same mesh axes.

    Args:
      x: a NumPy or JAX array.
      shape: the shape of the result.
      names: by axis of the result, the mesh axes that cut it; by default those that cut the first axis
        still cut it, and no other axis may be cut.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.mesh.shards import reshape
      >>> reshape(jnp.ones((2, 6)), (2, 2, 3)).shape
      (2, 2, 3)
    """
    shape = tuple(shape)
    if x.shape == shape or not _has_mesh(x) or not any(before := names_of(x)):
        return x.reshape(shape)
    if names is None:
        if any(before[1:]):
            raise ValueError(
                f"an array of shape {x.shape} is cut by the mesh axes {before}, and only its batch axis "
                "may be here; keep rows and columns of matrices whole."
            )
        names = (before[0], *((),) * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=spec(names))


def _has_mesh(x: Any) -> bool:
    """Whether the type may say that the array is cut: never inside `jax.shard_map`."""
    return not isinstance(x, np.ndarray) and Explicit in jax.typeof(x).sharding.mesh.axis_types


def flat_batch(matrices: jax.Array, size: int) -> jax.Array:
    """`[..., size, size]` as `[K, size, size]`."""
    return reshape(matrices, (math.prod(matrices.shape[:-2]), size, size))


def flat_axes(x: jax.Array, count: int) -> jax.Array:
    """The first axes of an array as one."""
    return reshape(x, (math.prod(x.shape[:count]), *x.shape[count:]))
