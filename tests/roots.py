"""Inverse roots in float64, and how close float32 can come to them."""

import functools
import math

import jax
import numpy as np
from ravine.optimizers.matrix.algebra.roots import (
    CoupledNewton,
    CoupledNewtonSchulz,
    Eigh,
    PseudoInverse,
    inverse_root,
)
from ravine.optimizers.matrix.algebra.roots_by_products import MARGIN, cubic_steps

from .tolerances import UNIT

METHODS = {"eigh": Eigh(), "newton": CoupledNewton(), "schulz": CoupledNewtonSchulz()}
ALL = {**METHODS, "pseudo": PseudoInverse()}
EXACT = {"eigh": Eigh(), "newton": CoupledNewton(), "pseudo": PseudoInverse()}
roots_of = jax.jit(inverse_root, static_argnames=("exponent", "method", "ridge", "absolute_ridge"))


def spd(values, seed=0):
    """Matrices `[1, n, n]` with these eigenvalues, in float64."""
    n = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return ((basis * np.asarray(values)) @ basis.T)[None]


@functools.cache
def _decomposed(contents, shape):
    return np.linalg.eigh(np.frombuffer(contents).reshape(shape))


def exact(matrices, exponent):
    """The exact powers of the matrices, in float64."""
    matrices = np.asarray(matrices, np.float64)
    values, vectors = _decomposed(matrices.tobytes(), matrices.shape)
    return (vectors * values[:, None, :] ** exponent) @ np.swapaxes(vectors, 1, 2)


def relative(found, expected):
    """The largest difference within each matrix, relative to its largest element."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max((1, 2)) / np.abs(expected).max((1, 2))


def attainable(condition, p, method="eigh", n=1):
    """How close a float32 root of exponent -1/p can come to the true one, as a relative error.

    A rounding unit of the largest eigenvalue is `condition` units of the smallest, and A^(-1/p) divides
    that by p. The bound allows four of these: one for A, which float32 cannot represent exactly, and
    three for the decomposition or the products of the method, whose measured error on three instruction
    sets is 0.1 to 1.3 of these. Added to this are two products of n terms (or eigenvectors orthogonal to
    n units), whatever the condition number, and the distance at which the method would stop without
    rounding.
    """
    return (4 * condition / p + 2 * n) * UNIT + unfinished(method, condition, p, n)


def unfinished(method, condition, p, n):
    """How far from the root a method may stop in exact arithmetic, relative to the root."""
    if method == "newton":
        # No element of X^p A - I exceeds the tolerance, so its norm is at most n times that; X is off by
        # a p-th of it.
        return n * CoupledNewton().tolerance / p
    if method == "schulz":
        # The iteration acts on each eigenvalue separately; its second pair starts from the first one's.
        chosen, worst = CoupledNewtonSchulz(), 0.0
        for stage in (1, 2)[: p // 2]:
            x = np.geomspace(1 / (MARGIN * condition), 1, 1000) ** (1 / (2 * stage))
            lower = math.sqrt(chosen.lower ** (1 / stage) / MARGIN)
            for beta, alpha in cubic_steps(lower, chosen.steps):
                x = beta * x + alpha * x**3
            worst += np.abs(x - 1).max()
        return worst
    return 0.0


def certified(condition, p, method="eigh", n=1):
    """What the certificate may report for such a root: the smallest eigenvalue counts p times."""
    return p * condition ** (1 / p) * attainable(condition, p, method, n)
