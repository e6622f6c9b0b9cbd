"""Float32 arithmetic that gives the same bits for one count and for many, jitted or not.

Three things make XLA round one formula in different ways, and everything here avoids them
(measured in docs/log.md):

- a product that is added to something becomes a fused multiply-add once jitted, so products pass
  :func:`rounded` before a sum;
- factors known beforehand are multiplied with each other first, so :func:`rounded` also stands
  between two of them;
- an array divided by one number is multiplied by its reciprocal while a scalar is divided, so
  there is no division by a number but a multiplication by a reciprocal formed beforehand.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST = np.finfo(np.float32).max
LARGEST_DIVISOR = 2**29


def rounded(x: jax.Array) -> jax.Array:
    """`x`, rounded to float32 before it is used.

    A clamp to what every float32 satisfies: neither `lax.reduce_precision` nor
    `lax.optimization_barrier` outlives XLA's passes on CPU, and a single bound is removed by LLVM
    where it can infer the sign.
    """
    return lax.clamp(-LARGEST, x, LARGEST)


def times(x: jax.Array, factor: Any) -> jax.Array:
    """A product that XLA does not fuse or reorder."""
    return rounded(x * np.float32(factor))


def progress(count: jax.Array, steps: int) -> jax.Array:
    r"""How much of a phase is over, :math:`x = \min(t / T, 1)`."""
    over = times(count.astype(jnp.float32), np.float32(1) / np.float32(steps))
    return jnp.where(count >= steps, np.float32(1), over)


def between(start: float, end: float, left: jax.Array) -> jax.Array:
    """From `start` to `end` as `left` falls from 1 to 0."""
    value = times(left, start - end) + np.float32(end)
    return jnp.clip(value, np.float32(min(start, end)), np.float32(max(start, end)))


def power(x: jax.Array, exponent: float) -> jax.Array:
    """`x` to a constant power, written as XLA would rewrite it."""
    if exponent == 1:
        return x
    if exponent == 0.5:
        return jnp.sqrt(x)
    if float(exponent).is_integer() and abs(exponent) < 64:
        return rounded(lax.integer_pow(x, int(exponent)))
    return rounded(lax.pow(x, jnp.full_like(x, exponent)))


def raised(base: float, exponent: jax.Array) -> jax.Array:
    """A positive number to an array of exponents."""
    return rounded(lax.pow(jnp.full_like(exponent, base), exponent))


def half_cosine(x: jax.Array) -> jax.Array:
    r""":math:`\tfrac{1}{2} (1 + \cos \pi x)`."""
    return 0.5 * (1.0 + jnp.cos(times(x, np.pi)))


def select(count: jax.Array, boundaries: Sequence[int], table: Sequence[Any], dtype: Any) -> Any:
    """The entry for the phase that contains `count`; a boundary belongs to the phase that it begins.

    A chain of selects fuses with what follows: at 20 boundaries it takes half the time of
    `jnp.searchsorted` and a gather (docs/log.md).
    """
    value = jnp.full_like(count, table[0], dtype=dtype)
    for boundary, entry in zip(boundaries, table[1:], strict=True):
        value = jnp.where(count >= boundary, jnp.asarray(entry, dtype), value)
    return value


def multiplied_and_divided(
    x: jax.Array, y: jax.Array, plus: jax.Array, by: int
) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of ``x * y + plus`` by a number, where int32 has no room for the product.

    Long multiplication and division at once, from the first digits of `x` on: with digits of k bits and
    :math:`b \\le 2^{30 - k}`, no intermediate result exceeds :math:`2^{k + 1} (b - 1) < 2^{31}`.

    Args:
      x: int32, not negative.
      y, plus: int32, at least 0 and below `by`.
      by: b, from 1 to `LARGEST_DIVISOR`.
    """
    bits = 30 - (by - 1).bit_length()
    quotient = rest = jnp.zeros_like(x)
    for place in reversed(range(0, 31, bits)):
        digit = (x >> place) & (2**bits - 1)
        product = (rest << bits) + digit * y + (plus if place == 0 else 0)
        quotient, rest = (quotient << bits) + product // by, product % by
    return quotient, rest
