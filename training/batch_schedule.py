"""Batches that grow during a run: which there are, and the learning rates that go with them."""

import dataclasses
import math
from typing import Literal

import optax

from .. import schedules
from ..schedules import BatchSizes
from ..schedules.scaling import scale_learning_rate

Rule = Literal["linear", "sqrt"]
LINEAR = ("sgd", "nesterov")
"""Optimizers whose step is as long as the gradient; those of all others have a size of their own."""


def rule_of(name: str) -> Rule:
    """How an optimizer's learning rate follows the batch size.

    SGD's is proportional to it (Goyal et al., 2017, https://arxiv.org/abs/1706.02677). Where the step
    is divided by the size of the gradient, which noise dominates, by its square root (Malladi et al.,
    2022, https://arxiv.org/abs/2205.10287, for RMSProp and Adam). The same holds, by the same argument,
    for signs and for matrices that are orthogonalized or whitened: the step's length is fixed, and its
    share of signal grows as the square root of the batch. `python -m ravine batch-size` measures it.
    """
    return "linear" if name in LINEAR else "sqrt"


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """How the batch grows; the run sees the data that its steps at a constant batch would."""

    batch_schedule: Literal["constant", "ramp", "seesaw"] = "constant"
    """ramp: from a small batch up to batch_size; seesaw: the batch grows in place of the learning
    rate's decay. Steps, warm-up and the schedule are counted at batch_size; learning rates are rescaled
    by each optimizer's rule, decay rates and weight decay stay."""
    ramp_start: int = 0
    """First batch of a ramp, in sequences."""
    ramp_increment: int = 0
    """What a ramp adds each time; 0 for as much as it starts with."""
    ramp_examples: int = 0
    """Sequences over which a ramp takes place."""
    seesaw_factor: float = 0.5
    """Where the schedule has fallen by another such factor, the batch is divided by it, and the
    learning rate multiplied by its square root only."""
    largest_batch: int = 0
    """A Seesaw's batch stays at or below this, in sequences: 0 for no bound. The critical batch of
    `ravine batch-size` is a good one."""

    def __post_init__(self) -> None:
        ramp = self.batch_schedule == "ramp"
        for name in ("ramp_start", "ramp_examples"):
            if ramp and getattr(self, name) < 1:
                raise ValueError(f"a ramp needs {name} of at least 1, got {getattr(self, name)}.")
        if self.ramp_increment < 0 or self.largest_batch < 0:
            raise ValueError("ramp_increment and largest_batch must not be negative.")
        given = {
            "ramp": bool(self.ramp_start or self.ramp_increment or self.ramp_examples),
            "seesaw": bool(self.largest_batch or self.seesaw_factor != 0.5),
        }
        for name, is_given in given.items():
            if is_given and self.batch_schedule != name:
                raise ValueError(
                    f"options of a {name} are given; give --batch-schedule {name}, or leave them out."
                )

    def sizes(self, batch_size: int, steps: int, reference: optax.Schedule) -> BatchSizes:
        """The batch of every update.

        Args:
          batch_size: that in which `steps` and `reference` are counted.
          steps: those of the reference, all of it.
          reference: learning rates, of any peak.

        Raises:
          ValueError: for a ramp or a Seesaw that does not fit.
        """
        if self.batch_schedule == "ramp":
            step = self.ramp_increment or self.ramp_start
            return schedules.batch_ramp(self.ramp_start, batch_size, step, self.ramp_examples)
        if self.batch_schedule == "seesaw":
            return self._seesaw(batch_size, steps, reference)[1]
        return BatchSizes((batch_size,))

    def rates(
        self, batch_size: int, steps: int, reference: optax.Schedule, rule: Rule
    ) -> optax.Schedule:
        """Learning rates for these batches, `reference` for constant ones; arguments as for `sizes`.

        Those of a ramp are the reference's for the data seen so far, scaled by `rule` to the batch.
        A Seesaw's are those of its paper, which has the square root; by the linear rule they stay
        where they are while the batch grows.
        """
        if self.batch_schedule == "constant":
            return reference
        if self.batch_schedule == "ramp":
            sizes = self.sizes(batch_size, steps, reference)
            unscaled: optax.Schedule = schedules.follow_data(reference, sizes, batch_size)
            scale = lambda ratio: scale_learning_rate(1.0, ratio, rule)
        else:
            unscaled, sizes = self._seesaw(batch_size, steps, reference)
            scale = lambda ratio: scale_learning_rate(1.0, ratio, rule) / math.sqrt(ratio)
        first, *later = (scale(size / batch_size) for size in sizes.sizes)
        factors = schedules.piecewise(1.0, sizes.boundaries, later, start_ratio=first)
        rates = schedules.product(unscaled, factors)
        return dataclasses.replace(rates, words=f"{self.batch_schedule} of batches")

    def _seesaw(
        self, batch_size: int, steps: int, reference: optax.Schedule
    ) -> tuple[optax.Schedule, BatchSizes]:
        largest = self.largest_batch or None
        if largest and largest < batch_size:
            raise ValueError(
                f"largest_batch {largest} is below the batch_size of {batch_size}; raise it."
            )
        return schedules.seesaw(reference, steps, batch_size, self.seesaw_factor, largest=largest)


CONSTANT = BatchSchedule()
