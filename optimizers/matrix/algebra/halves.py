r"""Newton–Schulz products of matrices that stay cut into two halves of their rows.

With :math:`X = (X_1; X_2)` every Gram matrix, and every polynomial of one, is symmetric. Three of its
four blocks are computed and the fourth is a transpose, so a symmetric product costs 3/4.
`symmetric_product` saves the same, but cuts and joins matrices for every product; here they are cut
once and joined once.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .newton_schulz import product


class Rows(NamedTuple):
    """The two halves of a batch of matrices, `[K, M/2, N]`."""

    upper: jax.Array
    lower: jax.Array


class Symmetric(NamedTuple):
    """A batch of symmetric matrices by their blocks `[K, M/2, M/2]`."""

    first: jax.Array
    right: jax.Array  # above the diagonal; the block below is its transpose
    last: jax.Array


@dataclasses.dataclass(frozen=True)
class Halves:
    """Products of matrices in halves; :mod:`.newton_schulz` has the same of whole matrices."""

    dtype: Any
    precision: Any

    def cut(self, x: jax.Array) -> Rows:
        """The halves of matrices `[K, M, N]`."""
        half = x.shape[1] // 2
        return Rows(x[:, :half], x[:, half:])

    def joined(self, x: Rows) -> jax.Array:
        """The inverse of `cut`."""
        return jnp.concatenate(x, axis=1)

    def identity(self, like: Symmetric) -> Symmetric:
        """The identity, which broadcasts to `like`."""
        eye = jnp.eye(like.first.shape[1], dtype=like.first.dtype)[None]
        return Symmetric(eye, jnp.zeros_like(eye), eye)

    def gram(self, x: Rows) -> Symmetric:
        """:math:`XX^\\top`."""
        upper, lower = _turned(x.upper), _turned(x.lower)
        return Symmetric(
            self._times(x.upper, upper),
            self._times(x.upper, lower),
            self._times(x.lower, lower),
        )

    def symmetric(self, p: Symmetric, q: Symmetric) -> Symmetric:
        """:math:`PQ`, of polynomials of one matrix, which is symmetric too."""
        (a, b, c), (d, e, f) = p, q
        return Symmetric(
            self._times(a, d) + self._times(b, _turned(e)),
            self._times(a, e) + self._times(b, f),
            self._times(_turned(b), e) + self._times(c, f),
        )

    def full(self, q: Symmetric, x: Rows) -> Rows:
        """:math:`QX`."""
        return Rows(
            self._times(q.first, x.upper) + self._times(q.right, x.lower),
            self._times(_turned(q.right), x.upper) + self._times(q.last, x.lower),
        )

    def congruent(self, q: Symmetric, r: Symmetric) -> Symmetric:
        """:math:`Q R Q^\\top`, in this order: the Gram matrix of :math:`QX` if R is that of X."""
        (a, b, c), under = q, _turned(q.right)
        above = self.full(q, Rows(r.first, _turned(r.right)))
        beside = self.full(q, Rows(r.right, r.last))
        return Symmetric(
            self._times(above.upper, _turned(a)) + self._times(beside.upper, under),
            self._times(above.upper, b) + self._times(beside.upper, _turned(c)),
            self._times(above.lower, b) + self._times(beside.lower, _turned(c)),
        )

    def _times(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return product(left.astype(self.dtype), right.astype(self.dtype), precision=self.precision)


def _turned(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)
