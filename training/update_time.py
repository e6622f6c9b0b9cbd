"""How long an optimizer takes for one update, without the model."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .model_config import ModelConfig
from .step import TrainState, unmeasured


def optimizer_milliseconds(
    model: ModelConfig, tx: optax.GradientTransformation, state: TrainState, repeats: int = 10
) -> float:
    """Median time of the update alone, its buffers donated as in training; `state` is used up.

    Estimates of a curvature are the model's work, and not counted.
    """
    tx = optax.with_extra_args_support(tx)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params, **unmeasured(model))
        return opt_state, optax.apply_updates(params, updates)

    shardings = jax.tree.map(lambda x: x.sharding, (state.opt_state, state.params))
    constants = lambda params: jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
    grads = jax.jit(constants, out_shardings=shardings[1])(state.params)
    compiled = jax.jit(update, donate_argnums=(1, 2), out_shardings=shardings)
    opt_state, params = jax.block_until_ready(compiled(grads, state.opt_state, state.params))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        opt_state, params = jax.block_until_ready(compiled(grads, opt_state, params))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))
