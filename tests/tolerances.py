"""How far two correct results may differ, defined in one place.

Sums in another order, as in a mesh or another kernel, differ by the rounding unit times the
magnification of the algorithm: the condition number of a root, the steepness of a Newton-Schulz
polynomial, a division by a small second moment. In float32 that can only be measured, on one processor.
So where two programs must do the same arithmetic in another order, they are compared in float64 and may
lose half of their digits. This allows a magnification of 1e8, while a misplaced block shows in the
second digit.
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
    """Converts leaves to float64, under `jax.enable_x64`."""
    return jax.tree.map(lambda x: jnp.array(np.asarray(x, np.float64)), tree)


def furthest(found: Any, expected: Any) -> float:
    """The largest difference between two trees, relative to each leaf's largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
        scale = np.max(np.abs(b), initial=0, where=np.isfinite(b))
        # NumPy's maximum of a number and NaN is NaN, so a NaN in one tree only counts as far off.
        worst = np.maximum(worst, np.max(difference, initial=0) / (scale or 1.0))
    return float(worst)


def without_residuals(tree: Any) -> Any:
    """Residuals and condition numbers of roots magnify rounding, and only they differ."""
    is_record = lambda path: path and getattr(path[-1], "name", "") == "record"
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(x)[..., 2:] if is_record(path) else x, tree
    )
