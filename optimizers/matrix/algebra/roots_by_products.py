"""Inverse roots by matrix products alone, for accelerators."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .root_parts import Found, condition, identity, largest_eigenvalue, multiply, power, ridged

MARGIN = 1.1
"""The estimate of the largest eigenvalue times this is an upper bound."""


@dataclasses.dataclass(frozen=True)
class CoupledNewton:
    r"""Newton's iteration for the inverse p-th root, coupled with :math:`M = X^p A`.

    .. math:: M' = (1 + 1/p) I - M/p, \qquad X \leftarrow X M', \qquad M \leftarrow M'^p M

    Matrices that have converged, or that would become worse, are not changed while others continue.

    Attributes:
      tolerance: stop when no element of M - I is larger.
      max_iterations: the largest number of iterations.
      error_ratio: stop when the error grows by this factor, and keep the previous iterate.

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
        a, eye = ridged(matrices_KxNxN, ridge, absolute), identity(matrices_KxNxN)
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
        return Found(root, a, eye, condition(a, root, p))


@dataclasses.dataclass(frozen=True)
class CoupledNewtonSchulz:
    r"""A fixed number of coupled steps towards :math:`A^{1/2}` and :math:`A^{-1/2}`; once more for 1/4.

    .. math:: Z \leftarrow \beta Z + \alpha (ZY) Z, \qquad Y \leftarrow \beta Y + \alpha Y (ZY)

    from :math:`Y_0 = A, Z_0 = I`, with the cubic polynomials that bring the root of every eigenvalue in
    [lower, 1] as near to one as any can (`cubic_steps`). It takes matrix products only, and no
    conditions on values: the method for accelerators. Ten steps reach condition numbers up to about 1e5
    with a residual of a few hundredths, and 1e6 with one of a few tenths: give singular matrices a
    ridge of 1e-4.

    Attributes:
      steps: number of steps, with three products each.
      lower: the smallest eigenvalue, relative to the largest, that must come near one.

    Source: the coefficients are those of CANS, Grishina et al., 2025, https://arxiv.org/abs/2506.10935.
    """

    steps: int = 10
    lower: float = 1e-6

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lower < 1:
            raise ValueError(f"steps must be at least 1 and lower in (0, 1), got {self}.")

    def check_root(self, p: int) -> None:
        """Raises for exponents that it does not support."""
        if p not in (2, 4):
            raise ValueError(
                f"CoupledNewtonSchulz finds multiples of the exponents -1/2 and -1/4, not of -1/{p}; "
                "use Eigh or CoupledNewton."
            )

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`."""
        self.check_root(p)
        a = ridged(matrices_KxNxN, ridge, absolute)
        square, root = self._pair(a, self.lower)
        if p == 4:
            _, root = self._pair(square, math.sqrt(self.lower))
        return Found(root, a, identity(a), condition(a, root, p))

    def _pair(self, a: jax.Array, lower: float) -> tuple[jax.Array, jax.Array]:
        """The root and the inverse root."""
        # The estimate is at most a few percent too small; a norm that is certain to bound the largest
        # eigenvalue, such as that of the row sums, may be ten times too large, which costs steps.
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

        # A loop: unrolled, it takes ten times longer to compile, and runs no faster.
        steps = jnp.asarray(cubic_steps(math.sqrt(lower / MARGIN), self.steps), a.dtype)
        (y, z), _ = jax.lax.scan(step, (a / bound, identity), steps)
        return y * jnp.sqrt(bound), z / jnp.sqrt(bound)


def cubic_steps(lower: float, steps: int) -> list[tuple[float, float]]:
    r"""Coefficients :math:`(\beta, \alpha)` of the best :math:`\beta x + \alpha x^3` for every step.

    On :math:`[a, b]` the cubic closest to one touches :math:`1 - \epsilon` at both ends and
    :math:`1 + \epsilon` in between; with :math:`e = (a^2 + ab + b^2)/3` that is
    :math:`\alpha = -2 / (2 e^{3/2} + a(3e - a^2))` and :math:`\beta = -3 e \alpha`. The next step works
    on :math:`[1 - \epsilon, 1 + \epsilon]`.

    Example:
      >>> from ravine.optimizers.matrix.algebra.roots_by_products import cubic_steps
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
