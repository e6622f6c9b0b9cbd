"""The last few values of something, in a ring buffer that lives in an optimizer's state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """The newest values of a series."""

    values: jax.Array  # float32 [length], value t at t mod length
    count: jax.Array  # int32 scalar, values written so far


def empty_window(length: int) -> Window:
    """A window without any value."""
    return Window(jnp.zeros(length, jnp.float32), jnp.zeros([], jnp.int32))


def push(window: Window, value: jax.Array) -> Window:
    """The window with one more value, which takes the place of the oldest."""
    at = window.count % window.values.shape[0]
    value = value.astype(window.values.dtype)
    return Window(window.values.at[at].set(value), window.count + 1)


def _present(window: Window) -> tuple[jax.Array, jax.Array]:
    length = window.values.shape[0]
    present = jnp.arange(length, dtype=jnp.int32) < window.count
    return present, jnp.minimum(window.count, length)


def level(window: Window, *, robust: bool = False) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the values, or median and 1.4826 times their median deviation."""
    present, number = _present(window)
    if robust:
        center = _median(window.values, present, number)
        deviations = jnp.abs(window.values - center)
        return center, 1.4826 * _median(deviations, present, number)
    weight = jnp.maximum(number, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(present, window.values, 0)) / weight
    square = jnp.sum(jnp.where(present, jnp.square(window.values - mean), 0)) / weight
    return mean, jnp.sqrt(square)


def _median(values: jax.Array, present: jax.Array, number: jax.Array) -> jax.Array:
    ordered = jnp.sort(jnp.where(present, values, jnp.inf))
    low, high = jnp.maximum(number - 1, 0) // 2, number // 2
    return jnp.where(number > 0, (ordered[low] + ordered[high]) / 2, 0)


def threshold(window: Window, deviations: float, *, robust: bool = False) -> jax.Array:
    """The level and so many deviations above it, of which each is at least a hundredth of the level.

    The floor is for a series that hardly moves, where rounding would be many deviations.
    """
    center, deviation = level(window, robust=robust)
    return center + deviations * jnp.maximum(deviation, 0.01 * jnp.abs(center))
