"""Checks: each error names the problem and the fix in one sentence."""

import math
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np


def check_cap(cap: Any) -> None:
    """Raises unless the cap is None or positive and finite."""
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"cap must be positive and finite, got {cap!r}; None means no cap.")


def check_extra_given(value: Any, name: str, what: str) -> None:
    """Raises when `update` was called without an extra argument."""
    if value is None:
        raise ValueError(f"{what} needs {name}: call tx.update(grads, state, params, {name}=...).")


def check_scalar_loss(loss: Any) -> None:
    """Raises for losses with axes, of which a guard could not decide for all."""
    if jnp.ndim(loss):
        raise ValueError(f"loss must be one number, got shape {jnp.shape(loss)}; give its mean.")


def check_same_shape(shape: tuple[int, ...], **others: Any) -> None:
    """Raises unless every array, or None, has the shape of the labels."""
    for name, array in others.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(
                f"{name} must have the shape of the labels, got {jnp.shape(array)} and {shape}."
            )


def check_labels(labels: Any, classes: int, weights: Any = None) -> None:
    """Raises for labels that are no integers or, outside `jit`, that are counted and out of range."""
    dtype = jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {dtype}; cast them.")
    if isinstance(labels, jax.core.Tracer) or isinstance(weights, jax.core.Tracer):
        return
    outside = (np.asarray(labels) < 0) | (np.asarray(labels) >= classes)
    if weights is not None:
        outside &= np.asarray(weights) != 0
    if np.any(outside):
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"label {int(np.asarray(labels)[at])} at {at} is not in [0, {classes}); "
            "correct it, or give that position the weight 0."
        )
