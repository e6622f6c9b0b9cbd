"""Schedule-Free in the trainer: its rate stays at the peak, and its average is evaluated."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..core.transformation import states_of
from ..optimizers.schedule_free import ScheduleFreeState, schedule_free_eval_params
from .config import COSINE, RunConfig
from .step import TrainState

SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd")
"""Registered optimizers whose learning rate warms up and then stays."""


def with_own_schedule(run: RunConfig, name: str) -> RunConfig:
    """The run with a schedule: the given one, or else that of the optimizer.

    Schedule-Free's is constant: the average of the iterates takes the place of a decay to zero, under
    which it would be one of iterates that hardly move.

    Args:
      run: one with `schedule_options` or `end_ratio` has a cosine for all optimizers.
      name: of the optimizer.

    Example:
      >>> from ravine.training.config import RunConfig
      >>> from ravine.training.schedule_free import with_own_schedule
      >>> names = ("adamw", "schedule_free_adamw")
      >>> [with_own_schedule(RunConfig(), name).schedule for name in names]
      ['cosine', 'constant']
      >>> [with_own_schedule(RunConfig(schedule="cosine"), name).schedule for name in names]
      ['cosine', 'cosine']
    """
    if run.schedule is not None:
        return run
    own = name in SCHEDULE_FREE and not run.schedule_options and run.end_ratio is None
    return dataclasses.replace(run, schedule="constant" if own else COSINE)


def schedules_in_words(run: RunConfig, names: Iterable[str]) -> str:
    """The schedules that the optimizers of a race follow.

    Example:
      >>> from ravine.training.config import RunConfig
      >>> from ravine.training.schedule_free import schedules_in_words
      >>> schedules_in_words(RunConfig(), ["adamw", "schedule_free_adamw"])
      'cosine; constant for schedule_free_adamw'
      >>> schedules_in_words(RunConfig(), ["schedule_free_adamw"])
      'constant'
    """
    own = {name: with_own_schedule(run, name).schedule_name for name in names}
    (most, *rest) = sorted(set(own.values()), key=lambda schedule: schedule != run.schedule_name)
    words = [f"{x} for {', '.join(n for n in own if own[n] == x)}" for x in rest]
    return "; ".join([most, *words])


def evaluated(state: TrainState) -> Any:
    """The parameters whose loss counts: Schedule-Free's average, of all others those trained."""
    if not states_of(ScheduleFreeState, state.opt_state):
        return state.params
    return schedule_free_eval_params(state.opt_state, state.params)
