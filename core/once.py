"""Work that is done on some steps only, in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def after(number: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
    """The same integer, which the compiler cannot know before the arrays.

    What waits for it may overwrite what the arrays were computed from, instead of a copy of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.core.once import after
      >>> int(after(jnp.int32(3), [jnp.array([jnp.nan])]))
      3
    """
    seen = [jnp.abs(x[(0,) * x.ndim]).astype(jnp.float32) for x in arrays if x.size]
    # A sum of zeros for NaN and every number, infinite ones too, in a form that XLA does not simplify.
    bits = [jax.lax.population_count(jax.lax.bitcast_convert_type(x, jnp.int32)) >> 6 for x in seen]
    return functools.reduce(jnp.add, bits, number)


def once(due: jax.Array, body: Callable[[Any], Any], carry: Any) -> tuple[jax.Array, Any]:
    """``body(carry)`` if `due`, otherwise `carry`, without copying it.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.core.once import once
      >>> [int(once(jnp.array(due), lambda x: x + 1, jnp.int32(1))[1]) for due in (True, False)]
      [2, 1]
    """
    return jax.lax.while_loop(
        lambda state: state[0], lambda state: (jnp.zeros_like(due), body(state[1])), (due, carry)
    )


def either(flag: jax.Array, yes: Callable[[Any], Any], no: Callable[[Any], Any], carry: Any) -> Any:
    """``yes(carry)`` if the flag is set, otherwise ``no(carry)``, in place.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.core.once import either
      >>> [int(either(jnp.array(up), lambda x: x + 1, lambda x: x - 1, 0)) for up in (True, False)]
      [1, -1]
    """
    return once(~flag, no, once(flag, yes, carry)[1])[1]


def if_due(due: jax.Array | None, body: Callable[[Any], Any], carry: Any) -> Any:
    """``body(carry)``, or `carry` if there is a flag that is not set."""
    return body(carry) if due is None else once(due, body, carry)[1]
