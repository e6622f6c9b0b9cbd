"""Random and rounded arrays that several tests use as inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def single(x: Any) -> jax.Array:
    """Converted to float32, whatever dtype the tree was computed in."""
    return jnp.array(np.asarray(x, np.float32))


def normal_leaves(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Standard normal float64 leaves by name: parameters, or their gradients when given another seed."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}
