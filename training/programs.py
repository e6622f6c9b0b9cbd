"""The step as XLA compiles it: one program for each size of batch."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..core.transformation import states_of
from ..stability import FiniteGateState, SkipStepState, monitored, noise_scale
from .config import RunConfig
from .curvature import HUTCHINSON
from .placed import REMEMBERED, Placed
from .step import TrainState, make_train_step


class Programs:
    """``traced, program = programs.of(size, state)``, and then
    ``state, metrics, sampled = program(state, batch)``, which donates `state`.

    A program is compiled when a batch of its size first comes, and JAX keeps it: the next run of the
    same step, as with another seed, is given it again.

    Args:
      run: which steps.
      placed: the model and the optimizer.
      rows: of a batch.
      optimizer: its registered name.
    """

    def __init__(self, run: RunConfig, placed: Placed, rows: NamedSharding, optimizer: str):
        self._optimizer = optimizer
        self._run, self._placed, self._rows = run, placed, rows
        self._parts = run.batch_size // rows.shard_shape((run.batch_size,))[0]
        self._size, self._program = 0, (None, None)
        self.seconds = 0.0  # of tracing and compiling

    def in_use(self, size: int) -> bool:
        """Whether the program of the last batch was for this size."""
        return size == self._size

    def of(self, size: int, state: TrainState) -> tuple[Any, Any]:
        """The trace of the program for batches of this size, and the program."""
        if not self.in_use(size):
            started, run = time.perf_counter(), self._run
            shape = (size, run.model.context + 1)
            batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows)
            settings = settings_of(run, self._optimizer)
            micro_batches = run.micro_batches_of(size, self._parts)
            step = _step(self._placed, micro_batches=micro_batches, **settings)
            traced = step.trace(state, batch)
            self._size, self._program = size, (traced, traced.lower().compile())
            self.seconds += time.perf_counter() - started
        return self._program


def settings_of(run: RunConfig, optimizer: str) -> dict[str, Any]:
    """Arguments of `make_train_step` for a run of this optimizer, in the trainer and in the planner."""
    return {
        "z_loss": run.z_loss,
        "monitor_every": run.monitor_every,
        "attention_logits": bool(run.qk_clip or run.monitor_every),
        "fused": run.fused,
        "noise_scale_every": run.noise_scale_every,
        "by_hutchinson": optimizer in HUTCHINSON,
    }


@functools.lru_cache(maxsize=REMEMBERED)
def _step(placed: Placed, **settings: Any) -> Any:
    """The jitted step, the same function for the same arguments, by which JAX knows its programs."""
    every = settings["monitor_every"], settings["noise_scale_every"]
    shardings = placed.shardings
    return jax.jit(
        _telling(make_train_step(placed.graphdef, placed.tx, **settings), *every),
        donate_argnums=0,
        out_shardings=(shardings, shardings.step, shardings.step),
    )


def guard_of(opt_state: Any) -> SkipStepState | FiniteGateState | None:
    """The state of the outermost guard."""
    return next(iter(states_of((SkipStepState, FiniteGateState), opt_state)), None)


def _telling(
    step: Callable[..., Any], monitor_every: int, noise_scale_every: int
) -> Callable[..., Any]:
    """The step, and what its state tells: skipped steps among the metrics; monitors and noise apart."""

    def telling(state: TrainState, batch: Any) -> tuple[TrainState, Any, Any]:
        state, metrics = step(state, batch)
        if guard := guard_of(state.opt_state):
            metrics |= {"skipped": guard.skipped}
        monitors = monitored(state.opt_state) if monitor_every else {}
        noise = noise_scale(state.opt_state) if noise_scale_every else {}
        return state, metrics, (monitors, noise)

    return telling
