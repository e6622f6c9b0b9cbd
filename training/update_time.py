"""How long an optimizer takes for one update, without the model."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .placed import Placed
from .step import TrainState, unmeasured


def optimizer_milliseconds(placed: Placed, state: TrainState, repeats: int = 10) -> float:
    """Median time of the update alone, its buffers donated as in training; `state` is used up.

    Estimates of a curvature are the model's work, and not counted.
    """
    gradients, update = _programs(placed)
    grads = gradients(state.params)
    opt_state, params = jax.block_until_ready(update(grads, state.opt_state, state.params))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        opt_state, params = jax.block_until_ready(update(grads, opt_state, params))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


@functools.lru_cache(maxsize=1)  # seeds of one optimizer follow each other
def _programs(placed: Placed) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Gradients for these parameters, and the update."""
    tx, extra = optax.with_extra_args_support(placed.tx), unmeasured(placed.model)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return opt_state, optax.apply_updates(params, updates)

    constants = lambda params: jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    shardings = placed.shardings.opt_state, placed.shardings.params
    return (
        jax.jit(constants, out_shardings=shardings[1]),
        jax.jit(update, donate_argnums=(1, 2), out_shardings=shardings),
    )
