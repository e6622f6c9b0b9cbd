"""Shared by the methods for inverse roots: their result, ridges, the largest eigenvalue, products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Found(NamedTuple):
    """The result of a method."""

    root: jax.Array  # [K, n, n]: R
    ridged: jax.Array  # [K, n, n]: A, with its ridge
    identity: jax.Array  # what A R^p should be
    condition: jax.Array  # [K]


def largest_eigenvalue(matrices_KxNxN: jax.Array, iterations: int = 24) -> jax.Array:
    """`[K]`: the largest eigenvalues of symmetric positive semi-definite matrices, to a few percent.

    `optax.power_iteration` on matrices divided by their largest element, with a fixed number of steps:
    so the estimate is equally good at scales of 1e-12 and 1. It is never above the true value.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.root_parts import largest_eigenvalue
      >>> found = largest_eigenvalue(1e-12 * jnp.diag(jnp.array([1.0, 3.0]))[None])
      >>> round(1e12 * float(found[0]), 3)
      3.0
    """
    if 0 in matrices_KxNxN.shape:
        return jnp.zeros(matrices_KxNxN.shape[0], matrices_KxNxN.dtype)
    largest = jnp.max(jnp.abs(matrices_KxNxN), axis=(1, 2))
    scaled = matrices_KxNxN / jnp.where(largest > 0, largest, 1)[:, None, None]

    def estimate(matrix: jax.Array) -> jax.Array:
        value, _ = optax.power_iteration(matrix, num_iters=iterations, error_tolerance=0.0)
        return jnp.asarray(value)

    found = jax.vmap(estimate)(scaled).astype(largest.dtype)
    return jnp.where(largest > 0, found * largest, largest)


def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix products in full float32 on every platform."""
    return jnp.matmul(left, right, precision="highest")


def power(a: jax.Array, exponent: int) -> jax.Array:
    """A positive integer power, in full float32."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(a, exponent)


def ridged(a: jax.Array, ridge: Any, absolute: Any) -> jax.Array:
    """A, with a ridge relative to its largest eigenvalue, and an absolute one."""
    return a + (ridge * largest_eigenvalue(a)[:, None, None] + absolute) * identity(a)


def condition(a: jax.Array, root: jax.Array, p: int) -> jax.Array:
    """The condition number of A, from its inverse p-th root."""
    return largest_eigenvalue(a) * largest_eigenvalue(root) ** p


def identity(a: jax.Array) -> jax.Array:
    """`[1, n, n]`, for matrices `[K, n, n]`."""
    return jnp.eye(a.shape[-1], dtype=a.dtype)[None]
