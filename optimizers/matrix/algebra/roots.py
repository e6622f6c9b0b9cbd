r"""Inverse roots :math:`A^{-q/p}` of batches of symmetric positive semi-definite matrices.

The limits of float32 determine everything here. Eigenvalues are accurate to
:math:`\epsilon\lambda_{\max}`, so below a relative ridge of about 1e-7 no method finds the root of a
badly conditioned matrix; and iterations that carry :math:`M = X^p A` along report a tiny
:math:`\lVert M - I \rVert` where the true error is a quarter, because rounding makes M and X drift
apart. So:

* the ridge is relative to the largest eigenvalue, which is estimated without any absolute scale;
* every root is certified by the true residual :math:`\lVert A R^p - I \rVert_{\max}` of
  :math:`R = A^{-1/p}`; then :math:`X = R^q` (in :math:`A^q X^p` rounding errors alone are large);
* products are full float32 on every platform.

==================  ===================================================  ==========================
method              how                                                  exponents
==================  ===================================================  ==========================
`Eigh`              eigendecomposition: the most accurate                any rational
`PseudoInverse`     the same, small eigenvalues left out: no ridge       any rational
`CoupledNewton`     products only, until it has converged                any rational
`CoupledNewtonSchulz`  a fixed number of products, no conditions         -q/2, -q/4
==================  ===================================================  ==========================
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ....core.arithmetic import traces
from .root_parts import Found, identity, multiply, power, ridged
from .roots_by_eigh import Eigh, PseudoInverse
from .roots_by_products import CoupledNewton, CoupledNewtonSchulz

__all__ = [
    "CoupledNewton",
    "CoupledNewtonSchulz",
    "Eigh",
    "Found",
    "InverseRoot",
    "Method",
    "PseudoInverse",
    "exponent_fraction",
    "inverse_root",
    "misfit",
]


class InverseRoot(NamedTuple):
    """Roots and their quality, with one value per matrix."""

    root: jax.Array  # [K, n, n]
    residual: jax.Array  # [K]: largest element of |A R^p - I|; infinite where not all is finite
    condition: jax.Array  # [K]: estimate of the condition number, ridge included


class Method(Protocol):
    """A method for roots of matrices with a largest diagonal element near one."""

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """Finds :math:`(A + rI)^{-1/p}`, r = ridge * largest eigenvalue + absolute `[K, 1, 1]`."""
        ...


def exponent_fraction(exponent: float | Fraction) -> tuple[int, int]:
    """``(q, p)`` with exponent = -q/p.

    Raises:
      ValueError: for an exponent that is not negative, or not a fraction with a denominator up to 64.

    Example:
      >>> from ravine.optimizers.matrix.algebra.roots import exponent_fraction
      >>> exponent_fraction(-0.25), exponent_fraction(-2 / 3)
      ((1, 4), (2, 3))
    """
    if not (math.isfinite(exponent) and exponent < 0):
        raise ValueError(
            f"exponent must be negative, as -0.25, got {exponent!r}; None takes -1/(2 k) for k axes."
        )
    fraction = Fraction(-exponent).limit_denominator(64)
    if abs(float(fraction) + exponent) > 1e-6:
        raise ValueError(
            f"exponent must be a fraction with a denominator up to 64, got {exponent!r}."
        )
    return fraction.numerator, fraction.denominator


def inverse_root(
    matrices_KxNxN: jax.Array,
    exponent: float | Fraction,
    method: Method | None = None,
    *,
    ridge: float = 1e-5,
    absolute_ridge: float = 0.0,
    size: jax.Array | None = None,
) -> InverseRoot:
    r"""Roots :math:`(A + \rho I)^{-q/p}` with :math:`\rho = r\lambda_{\max} + r_{abs}`, certified.

    Args:
      matrices_KxNxN: symmetric positive semi-definite.
      exponent: -q/p, negative.
      method: `Eigh()` by default.
      ridge: :math:`r`, relative to an estimate of the largest eigenvalue. In float32, the root of a
        singular matrix has a residual of up to 0.04 at 1e-5 with `Eigh` and `CoupledNewton`, and up to
        0.3 at 1e-6.
      absolute_ridge: :math:`r_{abs}`.
      size: `[K]` integers; rows and columns from that index on are padding, and zero in the result.

    Returns:
      An `InverseRoot`. The root of a zero matrix without an absolute ridge is not finite, and its
      residual infinite; an all-padding matrix has root zero and residual zero.

    Raises:
      ValueError: for exponents that are not negative, or not supported by the method.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.roots import inverse_root
      >>> found = inverse_root(jnp.diag(jnp.array([1.0, 4.0]))[None], -1 / 2, ridge=0.0)
      >>> found.root.round(4)
      Array([[[1. , 0. ],
              [0. , 0.5]]], dtype=float32)
      >>> bool(found.residual[0] < 1e-5)
      True
    """
    chosen = Eigh() if method is None else method
    q, p = exponent_fraction(exponent)
    n = matrices_KxNxN.shape[-1]
    wide = jnp.float64 if matrices_KxNxN.dtype == jnp.float64 else jnp.float32
    a, inside = matrices_KxNxN.astype(wide), None
    if size is not None:
        inside = jnp.arange(n, dtype=size.dtype)[None] < size[:, None]
        a = jnp.where(inside[:, :, None] & inside[:, None, :], a, 0)
        # The mean eigenvalue is below the largest, so padding does not change the estimate of the
        # largest.
        mean = traces(a) / jnp.maximum(size, 1).astype(wide)
        filling = jnp.where(inside, 0, jnp.where(mean > 0, mean, 1)[:, None])
        a = a + filling[:, :, None] * jnp.eye(n, dtype=wide)[None]
    # Divided by its largest element, every matrix has the same scale: squares of tiny statistics
    # neither vanish nor overflow on the way.
    largest = jnp.max(jnp.diagonal(a, axis1=1, axis2=2), axis=1, initial=0)
    scale = jnp.where(largest > 0, largest, 1)[:, None, None]
    found = chosen(a / scale, p, ridge, absolute_ridge / scale)
    product = _materialized(multiply(found.ridged, power(found.root, p)))
    residual = jnp.max(jnp.abs(product - found.identity), axis=(1, 2))
    root = power(found.root, q) * scale ** (-q / p)
    if inside is not None:
        root = jnp.where(inside[:, :, None] & inside[:, None, :], root, 0)
        residual = jnp.where(size == 0, 0, residual)
    finite = jnp.all(jnp.isfinite(root), axis=(1, 2)) & jnp.isfinite(residual)
    return InverseRoot(root, jnp.where(finite, residual, jnp.inf), found.condition)


def misfit(
    matrices_KxNxN: jax.Array,
    root_KxNxN: jax.Array,
    exponent: float | Fraction,
    *,
    ridge: float = 1e-5,
    absolute_ridge: float = 0.0,
    size: jax.Array | None = None,
) -> jax.Array:
    r"""`[K]`: the largest element of :math:`(A + \rho I)^q X^p - I`, for a root X of an earlier A.

    Arguments as for `inverse_root`; of a zero matrix it is zero, and where anything is not finite, NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.roots import misfit
      >>> old = jnp.diag(jnp.array([1.0, 0.5]))[None]  # of diag(1, 4)
      >>> misfit(jnp.diag(jnp.array([1.0, 5.0]))[None], old, -1 / 2, ridge=0.0).round(3)
      Array([0.25], dtype=float32)
    """
    q, p = exponent_fraction(exponent)
    n = matrices_KxNxN.shape[-1]
    wide = jnp.float64 if matrices_KxNxN.dtype == jnp.float64 else jnp.float32
    inside = jnp.ones((1, n), bool)
    if size is not None:
        inside = jnp.arange(n, dtype=size.dtype)[None] < size[:, None]
    both = inside[:, :, None] & inside[:, None, :]
    a, x = (jnp.where(both, y.astype(wide), 0) for y in (matrices_KxNxN, root_KxNxN))
    largest = jnp.max(jnp.diagonal(a, axis1=1, axis2=2), axis=1, initial=0)
    scale = jnp.where(largest > 0, largest, 1)[:, None, None]
    lifted = ridged(a / scale, ridge, absolute_ridge / scale)
    product = _materialized(multiply(power(lifted, q), power(x * scale ** (q / p), p)))
    off = jnp.where(both, jnp.abs(product - identity(product)), 0)
    # Not `largest > 0`: statistics with NaN on the diagonal would fit.
    return jnp.where(jnp.any(a != 0, axis=(1, 2)), jnp.max(off, axis=(1, 2), initial=0), 0)


def _materialized(x: jax.Array) -> jax.Array:
    """`x`, protected from fusion: XLA for CPU (JAX 0.10) fuses a chain of products and a maximum into
    one kernel, four times slower than the two; it drops optimization barriers before it does."""
    numbers = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, numbers.nexp, numbers.nmant)
