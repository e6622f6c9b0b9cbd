"""The step as XLA compiles it: one program for each size of batch."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from ..core.transformation import states_of
from ..stability import FiniteGateState, SkipStepState, monitored, noise_scale
from .config import RunConfig
from .step import TrainState, make_train_step

HELD = 2
"""Programs at a time: the size in use and the one before it, to which a roll-back may return."""


class Programs:
    """``traced, program = programs.of(size, state)``, and then
    ``state, metrics, sampled = program(state, batch)``, which donates `state`.

    Args:
      run: which steps.
      graphdef: the model's static half.
      tx: the optimizer, as `place` returned it.
      shardings: of the state, likewise.
      rows: of a batch.
    """

    def __init__(
        self,
        run: RunConfig,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformation,
        shardings: TrainState,
        rows: NamedSharding,
    ):
        self._run, self._graphdef, self._tx = run, graphdef, tx
        self._shardings, self._rows = shardings, rows
        self._parts = run.batch_size // rows.shard_shape((run.batch_size,))[0]
        self._compiled: dict[int, tuple[Any, Any]] = {}
        self.seconds = 0.0  # of tracing and compiling

    def has(self, size: int) -> bool:
        """Whether this one need not be compiled."""
        return size in self._compiled

    def of(self, size: int, state: TrainState) -> tuple[Any, Any]:
        """The trace of the program for batches of this size, and the program."""
        if size not in self._compiled:
            started = time.perf_counter()
            shape = (size, self._run.model.context + 1)
            example = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._rows)
            traced = self._step(size).trace(state, example)
            self._compiled[size] = traced, traced.lower().compile()
            for other in list(self._compiled)[:-HELD]:
                del self._compiled[other]
            self.seconds += time.perf_counter() - started
        return self._compiled[size]

    def _step(self, size: int) -> Any:
        run, shardings = self._run, self._shardings
        step = make_train_step(
            self._graphdef,
            self._tx,
            run.micro_batches_of(size, self._parts),
            z_loss=run.z_loss,
            monitor_every=run.monitor_every,
            attention_logits=bool(run.qk_clip or run.monitor_every),
            fused=run.fused,
            noise_scale_every=run.noise_scale_every,
        )
        return jax.jit(
            _telling(step, run),
            donate_argnums=0,
            out_shardings=(shardings, shardings.step, shardings.step),
        )


def guard_of(opt_state: Any) -> SkipStepState | FiniteGateState | None:
    """The state of the outermost guard."""
    return next(iter(states_of((SkipStepState, FiniteGateState), opt_state)), None)


def _telling(step: Callable[..., Any], run: RunConfig) -> Callable[..., Any]:
    """The step, and what its state tells: skipped steps among the metrics; monitors and noise apart."""

    def telling(state: TrainState, batch: Any) -> tuple[TrainState, Any, Any]:
        state, metrics = step(state, batch)
        if guard := guard_of(state.opt_state):
            metrics |= {"skipped": guard.skipped}
        monitors = monitored(state.opt_state) if run.monitor_every else {}
        noise = noise_scale(state.opt_state) if run.noise_scale_every else {}
        return state, metrics, (monitors, noise)

    return telling
