"""Random and rounded arrays that several tests start from."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def single(x: Any) -> jax.Array:
    """In float32, whatever it was computed in."""
    return jnp.array(np.asarray(x, np.float32))


def normal_leaves(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Standard normal numbers in float64, by name: parameters, or with another seed their gradients."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}
