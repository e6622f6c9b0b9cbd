"""The step as XLA compiles it: one program for each size of batch."""

import dataclasses
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
from .cost import Cost, cost_of
from .placed import Placed
from .step import TrainState, make_train_step

KEPT = 8
"""Programs kept: for the next of several seeds, and sizes of batch to which a roll-back may return."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """``state, metrics, sampled = program.compiled(state, batch)``, which donates `state`."""

    placed: Placed
    state: TrainState
    """Its shapes."""
    traced: Any
    compiled: Any

    @functools.cached_property
    def cost(self) -> Cost:
        """Of a step."""
        placed = self.placed
        return cost_of(placed.model, placed.tx, self.state, self.traced, self.compiled)


class Programs:
    """``program = programs.of(size, state)``, compiled when a batch of its size first comes.

    A run like the last, as the next of several seeds, is given the same program.

    Args:
      run: which steps.
      placed: the model and the optimizer.
      rows: of a batch.
    """

    def __init__(self, run: RunConfig, placed: Placed, rows: NamedSharding):
        self._run, self._placed, self._rows = run, placed, rows
        self._parts = run.batch_size // rows.shard_shape((run.batch_size,))[0]
        self._current: tuple[int, Program] | None = None
        self.seconds = 0.0  # of tracing and compiling

    def in_use(self, size: int) -> bool:
        """Whether the program of the last batch was for this size."""
        return self._current is not None and self._current[0] == size

    def of(self, size: int, state: TrainState) -> Program:
        """The program for batches of this size."""
        if self._current and self.in_use(size):
            return self._current[1]
        started, run = time.perf_counter(), self._run
        program = _program(
            self._placed,
            jax.tree.structure(state),
            tuple(_shape_of(leaf) for leaf in jax.tree.leaves(state)),
            (size, run.model.context + 1),
            self._rows,
            micro_batches=run.micro_batches_of(size, self._parts),
            z_loss=run.z_loss,
            monitor_every=run.monitor_every,
            attention_logits=bool(run.qk_clip or run.monitor_every),
            fused=run.fused,
            noise_scale_every=run.noise_scale_every,
        )
        self._current = size, program
        self.seconds += time.perf_counter() - started
        return program


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=leaf.weak_type
    )


@functools.lru_cache(maxsize=KEPT)
def _program(
    placed: Placed, structure: Any, leaves: tuple[Any, ...], shape: Any, rows: Any, **settings: Any
) -> Program:
    state = jax.tree.unflatten(structure, leaves)
    step = make_train_step(placed.graphdef, placed.tx, **settings)
    every = settings["monitor_every"], settings["noise_scale_every"]
    shardings = placed.shardings
    program = jax.jit(
        _telling(step, *every),
        donate_argnums=0,
        out_shardings=(shardings, shardings.step, shardings.step),
    )
    traced = program.trace(state, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows))
    return Program(placed, state, traced, traced.lower().compile())


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
