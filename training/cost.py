"""The cost of a step, counted, not timed: floating-point operations, and the memory XLA sets aside."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from .placed import REMEMBERED, Placed
from .plan.chips import chip_of
from .plan.cost import bytes_per_device
from .plan.flops import arithmetic
from .step import TrainState, unmeasured


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step on one device.

    Attributes:
      step_flop: floating-point operations of a step in which nothing is refreshed.
      optimizer_flop: those of the optimizer among them.
      refresh_flop: at most this many more where roots, bases or a curvature are refreshed.
      peak_bytes: parameters, state, batch and temporaries at once, by XLA's own analysis.
      state_bytes: of the optimizer.
    """

    step_flop: float
    optimizer_flop: float
    refresh_flop: float
    peak_bytes: int
    state_bytes: int

    @property
    def optimizer_share(self) -> float:
        """Of the operations of a step in which nothing is refreshed, in [0, 1]."""
        return self.optimizer_flop / self.step_flop

    def utilization(self, seconds: float, device_kind: str, dtype: str) -> float | None:
        """Model FLOP utilization: operations of the model, per second, of the device's published peak.

        Args:
          seconds: of a step.
          device_kind: as JAX names the device.
          dtype: of activations.

        Returns:
          A number in [0, 1], or None for a device whose peak is not known, as a CPU's.

        Example:
          >>> from ravine.training.cost import Cost
          >>> cost = Cost(197e12, 0.0, 0.0, 0, 0)
          >>> cost.utilization(2.0, "TPU v5 lite", "bfloat16"), cost.utilization(2.0, "cpu", "float32")
          (0.5, None)
        """
        chip = chip_of(device_kind)
        if chip is None:
            return None
        return (self.step_flop - self.optimizer_flop) / (seconds * chip.products[dtype])


def cost_of(placed: Placed, state: TrainState, traced: Any, compiled: Any) -> Cost:
    """The cost of a step.

    Args:
      placed: the model and its optimizer.
      state: arrays or their shapes.
      traced: ``jax.jit(step).trace(state, batch)``.
      compiled: ``traced.lower().compile()``.
    """
    devices = len(jax.tree.leaves(state.params)[0].sharding.device_set)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    alone = arithmetic(
        _update(placed).trace(shapes.params, shapes.opt_state, shapes.params), devices
    )
    whole, memory = arithmetic(traced, devices), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Cost(
        whole.always,
        alone.always,
        whole.sometimes,
        held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        bytes_per_device(shapes.opt_state),
    )


@functools.lru_cache(maxsize=REMEMBERED)
def _update(placed: Placed) -> Any:
    tx = optax.with_extra_args_support(placed.tx)
    return jax.jit(functools.partial(tx.update, **unmeasured(placed.model)))
