r"""Inverse roots :math:`A^{-q/p}` of batches of symmetric positive semi-definite matrices.

What float32 can and cannot do decides everything here. Eigenvalues are accurate to
:math:`\epsilon\lambda_{\max}`, so below a relative ridge of about 1e-7 no method finds the root of a
badly conditioned matrix; and iterations that carry :math:`M = X^p A` along report a tiny
:math:`\lVert M - I \rVert` where the true error is a quarter, because rounding parts M from X. So:

* the ridge is relative to the largest eigenvalue, and that is estimated without any absolute scale;
* every root is certified by the true residual :math:`\lVert A R^p - I \rVert_{\max}` of
  :math:`R = A^{-1/p}`; then :math:`X = R^q` (of :math:`A^q X^p` rounding alone is large);
* products are float32 in full, wherever they run.

==================  ===================================================  ==========================
method              how                                                  exponents
==================  ===================================================  ==========================
`Eigh`              eigendecomposition: the most accurate                any rational
`PseudoInverse`     the same, small eigenvalues left out: no ridge       any rational
`CoupledNewton`     products only, until it has converged                any rational
`CoupledNewtonSchulz`  a fixed number of products, no conditions         -q/2, -q/4
==================  ===================================================  ==========================
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from .lapack import for_each_matrix

MARGIN = 1.1
"""An estimate of the largest eigenvalue times this is above it."""


class InverseRoot(NamedTuple):
    """Roots and what is known about them, one value a matrix."""

    root: jax.Array  # [K, n, n]
    residual: (
        jax.Array
    )  # [K]: largest element of |A^q X^p - I|; infinite where anything is not finite
    condition: jax.Array  # [K]: estimate of the condition number, ridge included


class Found(NamedTuple):
    """What a method found."""

    root: jax.Array  # [K, n, n]: R
    ridged: jax.Array  # [K, n, n]: A, with its ridge
    identity: jax.Array  # what A R^p should be
    condition: jax.Array  # [K]


class Method(Protocol):
    """What finds roots: of matrices whose largest diagonal element is near one."""

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """Finds :math:`(A + rI)^{-1/p}`, r = ridge * largest eigenvalue + absolute `[K, 1, 1]`."""
        ...


def exponent_fraction(exponent: float | Fraction) -> tuple[int, int]:
    """``(q, p)`` with exponent = -q/p.

    Raises:
      ValueError: for an exponent that is not negative, or no fraction with a denominator up to 64.

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
      ridge: :math:`r`, relative to an estimate of the largest eigenvalue. In float32, the root
        of a singular matrix has a residual of up to 0.04 at 1e-5 with `Eigh` and `CoupledNewton`, and
        of up to 0.3 at 1e-6.
      absolute_ridge: :math:`r_{abs}`.
      size: `[K]` integers; rows and columns from there on are padding, and zero in the result.

    Returns:
      An `InverseRoot`. Of a zero matrix without absolute ridge the root is not finite, and its residual
      infinite; an all-padding matrix has the root zero and residual zero.

    Raises:
      ValueError: for exponents that are not negative, or that the method cannot do.

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
        # The mean eigenvalue: below the largest, whose estimate then is that of the matrix alone.
        mean = jnp.trace(a, axis1=1, axis2=2) / jnp.maximum(size, 1).astype(wide)
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


@dataclasses.dataclass(frozen=True)
class Eigh:
    r"""By eigendecomposition, :math:`V \Lambda^{-q/p} V^\top`; no eigenvalue is taken below the ridge.

    Example:
      >>> import ravine
      >>> from ravine.optimizers.matrix.algebra.roots import Eigh
      >>> tx = ravine.shampoo(1e-3, root=Eigh())
    """

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`."""
        values, vectors = _eigh(matrices_KxNxN)
        lift = ridge * jnp.maximum(values[:, -1:], 0) + jnp.reshape(absolute, (-1, 1))
        ridged = matrices_KxNxN + lift[:, :, None] * _identity(matrices_KxNxN)
        # A value that the ridge does not lift above zero gives NaN, and the root is refused.
        values = values + lift
        root = _recompose(vectors, values ** (-1 / p))
        return Found(root, ridged, _identity(root), values[:, -1] / values[:, 0])


@dataclasses.dataclass(frozen=True)
class PseudoInverse:
    r"""The inverse root on the space of eigenvalues above a tolerance, zero on the rest; no ridge.

    Attributes:
      rtol: eigenvalues up to ``rtol * largest`` are left out; ``None`` takes n times the rounding unit.

    Source: Anil, 2026, facebookresearch/optimizers #265: it decides the quality of one-sided Shampoo.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must lie in [0, 1), got {self.rtol!r}.")

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`; the ridge is not used."""
        del ridge, absolute
        a = matrices_KxNxN
        values, vectors = _eigh(a)
        rtol = a.shape[-1] * jnp.finfo(a.dtype).eps if self.rtol is None else self.rtol
        kept = values > rtol * values[:, -1:]
        safe = jnp.where(kept, values, 1)
        root = _recompose(vectors, jnp.where(kept, safe ** (-1 / p), 0))
        condition = values[:, -1] / jnp.min(jnp.where(kept, values, values[:, -1:]), axis=1)
        return Found(root, a, _recompose(vectors, kept.astype(a.dtype)), condition)


@dataclasses.dataclass(frozen=True)
class CoupledNewton:
    r"""Newton's iteration for the inverse p-th root, coupled with :math:`M = X^p A`.

    .. math:: M' = (1 + 1/p) I - M/p, \qquad X \leftarrow X M', \qquad M \leftarrow M'^p M

    Matrices that have converged, or that would become worse, are left alone while others go on.

    Attributes:
      tolerance: stops where no element of M - I is larger.
      max_iterations: at most.
      error_ratio: stops where the error grows by this factor, and keeps the step before.

    Source: Guo and Higham, 2006; google-research/precondition, ``distributed_shampoo.py``.
    """

    tolerance: float = 1e-6
    max_iterations: int = 100
    error_ratio: float = 1.2

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.max_iterations < 1 or self.error_ratio < 1:
            raise ValueError(f"tolerance, max_iterations or error_ratio is out of range in {self}.")

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`."""
        a, eye = _ridged(matrices_KxNxN, ridge, absolute), _identity(matrices_KxNxN)
        norm = jnp.sqrt(jnp.sum(jnp.square(a), axis=(1, 2), keepdims=True))
        z = (1 + p) / (2 * norm)
        x, m = z ** (1 / p) * eye, z * a
        error = jnp.max(jnp.abs(m - eye), axis=(1, 2))
        going = error > self.tolerance

        def body(carry: Any) -> Any:
            count, x, m, error, going = carry
            step = (1 + 1 / p) * eye - m / p
            new_x, new_m = multiply(x, step), multiply(power(step, p), m)
            new_error = jnp.max(jnp.abs(new_m - eye), axis=(1, 2))
            better = going & (new_error < error * self.error_ratio)
            x = jnp.where(better[:, None, None], new_x, x)
            m = jnp.where(better[:, None, None], new_m, m)
            error = jnp.where(better, new_error, error)
            return count + 1, x, m, error, better & (error > self.tolerance)

        def unfinished(carry: Any) -> jax.Array:
            return (carry[0] < self.max_iterations) & jnp.any(carry[-1])

        start = (jnp.int32(0), x, m, error, going)
        root = jax.lax.while_loop(unfinished, body, start)[1]
        return Found(root, a, eye, _condition(a, root, p))


@dataclasses.dataclass(frozen=True)
class CoupledNewtonSchulz:
    r"""A fixed number of coupled steps towards :math:`A^{1/2}` and :math:`A^{-1/2}`; once more for 1/4.

    .. math:: Z \leftarrow \beta Z + \alpha (ZY) Z, \qquad Y \leftarrow \beta Y + \alpha Y (ZY)

    from :math:`Y_0 = A, Z_0 = I`, with the cubic polynomials that bring the root of every eigenvalue in
    [lower, 1] as near to one as any can (`cubic_steps`). Matrix products only, and nothing that depends
    on values: the method for accelerators. Ten steps reach condition numbers up to about 1e5 with a
    residual of a few hundredths, and 1e6 with one of a few tenths: give singular matrices a ridge of
    1e-4.

    Attributes:
      steps: products are 3 a step.
      lower: the smallest eigenvalue, relative to the largest, that must come near one.

    Source: the coefficients are those of CANS, Grishina et al., 2025, https://arxiv.org/abs/2506.10935.
    """

    steps: int = 10
    lower: float = 1e-6

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lower < 1:
            raise ValueError(f"steps must be at least 1 and lower in (0, 1), got {self}.")

    def check_root(self, p: int) -> None:
        """Raises for roots that it does not find."""
        if p not in (2, 4):
            raise ValueError(
                f"CoupledNewtonSchulz finds multiples of the exponents -1/2 and -1/4, not of -1/{p}; "
                "take Eigh or CoupledNewton."
            )

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`."""
        self.check_root(p)
        a = _ridged(matrices_KxNxN, ridge, absolute)
        square, root = self._pair(a, self.lower)
        if p == 4:
            _, root = self._pair(square, math.sqrt(self.lower))
        return Found(root, a, _identity(a), _condition(a, root, p))

    def _pair(self, a: jax.Array, lower: float) -> tuple[jax.Array, jax.Array]:
        """The root and the inverse root."""
        # The estimate is at most a few percent too small; a norm that bounds the largest eigenvalue for
        # sure, as the row sums', may be tenfold too large, which costs steps.
        bound = MARGIN * largest_eigenvalue(a)[:, None, None]
        identity = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype)[None], a.shape)

        def step(pair: Any, coefficients: jax.Array) -> tuple[Any, None]:
            (y, z), (beta, alpha) = pair, coefficients
            product = multiply(z, y)
            y, z = (
                beta * y + alpha * multiply(y, product),
                beta * z + alpha * multiply(product, z),
            )
            return (y, z), None

        # A loop: written out, compiling takes ten times as long, and running as long as this.
        steps = jnp.asarray(cubic_steps(math.sqrt(lower / MARGIN), self.steps), a.dtype)
        (y, z), _ = jax.lax.scan(step, (a / bound, identity), steps)
        return y * jnp.sqrt(bound), z / jnp.sqrt(bound)


def cubic_steps(lower: float, steps: int) -> list[tuple[float, float]]:
    r"""Coefficients :math:`(\beta, \alpha)` of the best :math:`\beta x + \alpha x^3` for every step.

    On :math:`[a, b]` the cubic that is nearest to one touches :math:`1 - \epsilon` at both ends and
    :math:`1 + \epsilon` between; with :math:`e = (a^2 + ab + b^2)/3` that is
    :math:`\alpha = -2 / (2 e^{3/2} + a(3e - a^2))` and :math:`\beta = -3 e \alpha`. The next step works
    on :math:`[1 - \epsilon, 1 + \epsilon]`.

    Example:
      >>> from ravine.optimizers.matrix.algebra.roots import cubic_steps
      >>> [tuple(round(c, 3) for c in step) for step in cubic_steps(0.01, 8)][::7]
      [(5.04, -4.989), (1.5, -0.5)]
    """
    a, b, table = lower, 1.0, []
    for _ in range(steps):
        e = (a * a + a * b + b * b) / 3
        alpha = -2 / (2 * e**1.5 + a * (3 * e - a * a))
        beta = -3 * e * alpha
        table.append((beta, alpha))
        a = beta * a + alpha * a**3
        b = 2 - a
    return table


def largest_eigenvalue(matrices_KxNxN: jax.Array, iterations: int = 24) -> jax.Array:
    """`[K]`: the largest eigenvalues of symmetric positive semi-definite matrices, to a few percent.

    `optax.power_iteration`, of matrices divided by their largest element and for a fixed number of
    steps: so the estimate is as good at 1e-12 as at 1. It is never above the true value.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.matrix.algebra.roots import largest_eigenvalue
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
    """Matrix products in full float32, whatever the platform's default."""
    return jnp.matmul(left, right, precision="highest")


def power(a: jax.Array, exponent: int) -> jax.Array:
    """A positive integer power, in full float32."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.matrix_power(a, exponent)


def _materialized(x: jax.Array) -> jax.Array:
    """`x`, out of reach of fusion: XLA for CPU (JAX 0.10) makes one kernel of a chain of products and a
    maximum, four times slower than the two; it drops an optimization barrier before it does."""
    numbers = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, numbers.nexp, numbers.nmant)


def _ridged(a: jax.Array, ridge: Any, absolute: Any) -> jax.Array:
    return a + (ridge * largest_eigenvalue(a)[:, None, None] + absolute) * _identity(a)


def _condition(a: jax.Array, root: jax.Array, p: int) -> jax.Array:
    """The condition number of A, from the inverse p-th root of it."""
    return largest_eigenvalue(a) * largest_eigenvalue(root) ** p


def _identity(a: jax.Array) -> jax.Array:
    return jnp.eye(a.shape[-1], dtype=a.dtype)[None]


def _eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return for_each_matrix(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)), a)


def _recompose(vectors: jax.Array, values: jax.Array) -> jax.Array:
    return multiply(vectors * values[:, None, :], jnp.swapaxes(vectors, 1, 2))
