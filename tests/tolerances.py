"""What two right answers may differ by, stated once.

Sums in another order, as a mesh or another kernel makes them, differ by the rounding unit times what the
algorithm magnifies it by: the condition of a root, the steepness of a Newton-Schulz polynomial, a
division by a small second moment. How much that is in float32 can only be measured, on one processor. So
what has to be the same arithmetic in another order is compared in float64, and may lose half of its
digits: room for a magnification of 1e8, where a block out of place is off in the second digit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNIT = 2.0**-24
"""The most by which rounding to float32 changes a number, relative to it."""

HALF = 2.0**-26
"""Half of the digits of a float64."""


def double(tree: Any) -> Any:
    """Leaves in float64, where `jax.enable_x64` holds."""
    return jax.tree.map(lambda x: jnp.array(np.asarray(x, np.float64)), tree)


def furthest(found: Any, expected: Any) -> float:
    """The largest difference of two trees, relative to each leaf's largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        with np.errstate(invalid="ignore"):  # infinity less infinity
            difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
        scale = np.max(np.abs(b), initial=0, where=np.isfinite(b))
        # Of NumPy, whose maximum of a number and NaN is NaN: what is NaN in one of them is far off.
        worst = np.maximum(worst, np.max(difference, initial=0) / (scale or 1.0))
    return float(worst)


def without_residuals(tree: Any) -> Any:
    """Certificates of roots and condition numbers magnify rounding, which is all that differs."""
    is_residual = lambda path: getattr(path[-1], "name", "") in ("residual", "condition")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros(()) if path and is_residual(path) else x, tree
    )
