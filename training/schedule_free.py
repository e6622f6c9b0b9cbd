"""Schedule-Free optimizers in the trainer: their rate does not decay, and their average is evaluated."""

import dataclasses
from typing import Any

from ..core.transformation import states_of
from ..optimizers.schedule_free import ScheduleFreeState, schedule_free_eval_params
from .config import RunConfig
from .step import TrainState

SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd")
"""Registered optimizers whose learning rate warms up and then stays."""


def with_own_schedule(run: RunConfig, name: str) -> RunConfig:
    """The run with the schedule that an optimizer is made for, unless another is asked for.

    The average of the iterates takes the place of a decay to zero, under which it would be one of
    iterates that hardly move.

    Args:
      run: its cosine without options counts as not asked for.
      name: of the optimizer.

    Example:
      >>> from ravine.training.config import RunConfig
      >>> from ravine.training.schedule_free import with_own_schedule
      >>> [with_own_schedule(RunConfig(), n).schedule for n in ("adamw", "schedule_free_adamw")]
      ['cosine', 'constant']
    """
    asked = run.schedule != "cosine" or run.schedule_options or run.end_ratio is not None
    if name not in SCHEDULE_FREE or asked:
        return run
    return dataclasses.replace(run, schedule="constant")


def evaluated(state: TrainState) -> Any:
    """The parameters whose loss counts: Schedule-Free's average, of all others those trained."""
    if not states_of(ScheduleFreeState, state.opt_state):
        return state.params
    return schedule_free_eval_params(state.opt_state, state.params)
