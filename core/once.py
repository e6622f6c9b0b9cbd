"""Work that is done on some steps only, in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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


def if_due(due: jax.Array | None, body: Callable[[Any], Any], carry: Any) -> Any:
    """``body(carry)``, or `carry` if there is a flag that is not set."""
    return body(carry) if due is None else once(due, body, carry)[1]
