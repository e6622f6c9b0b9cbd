"""Inverse roots by eigendecomposition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .lapack import eigh
from .root_parts import Found, identity, multiply


@dataclasses.dataclass(frozen=True)
class Eigh:
    r"""By eigendecomposition, :math:`V \Lambda^{-q/p} V^\top`; eigenvalues are raised to the ridge.

    Example:
      >>> import ravine
      >>> from ravine.optimizers.matrix.algebra.roots import Eigh
      >>> tx = ravine.shampoo(1e-3, roots=ravine.Roots(method=Eigh()))
    """

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`."""
        values, vectors = eigh(matrices_KxNxN)
        lift = ridge * jnp.maximum(values[:, -1:], 0) + jnp.reshape(absolute, (-1, 1))
        eye = identity(matrices_KxNxN)
        ridged = matrices_KxNxN + lift[:, :, None] * eye
        # A value that is not positive even with the ridge gives NaN, and the root is refused.
        values = values + lift
        root = _recompose(vectors, values ** (-1 / p))
        return Found(root, ridged, eye, values[:, -1] / values[:, 0])


@dataclasses.dataclass(frozen=True)
class PseudoInverse:
    r"""The inverse root on the space of eigenvalues above a tolerance, zero on the rest; no ridge.

    Attributes:
      rtol: eigenvalues up to ``rtol * largest`` are left out; ``None`` takes n times the rounding unit.

    Source: Anil, 2026, facebookresearch/optimizers #265: it determines the quality of one-sided
    Shampoo.
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 <= self.rtol < 1:
            raise ValueError(f"rtol must lie in [0, 1), got {self.rtol!r}.")

    def __call__(self, matrices_KxNxN: jax.Array, p: int, ridge: Any, absolute: Any) -> Found:
        """See `Method`; the ridge is not used."""
        del ridge, absolute
        a = matrices_KxNxN
        values, vectors = eigh(a)
        rtol = a.shape[-1] * jnp.finfo(a.dtype).eps if self.rtol is None else self.rtol
        kept = values > rtol * values[:, -1:]
        safe = jnp.where(kept, values, 1)
        root = _recompose(vectors, jnp.where(kept, safe ** (-1 / p), 0))
        condition = values[:, -1] / jnp.min(jnp.where(kept, values, values[:, -1:]), axis=1)
        return Found(root, a, _recompose(vectors, kept.astype(a.dtype)), condition)


def _recompose(vectors: jax.Array, values: jax.Array) -> jax.Array:
    return multiply(vectors * values[:, None, :], jnp.swapaxes(vectors, 1, 2))
