"""Functions `count -> value` for everything that a run changes over time.

The conventions, fixed once: ``schedule(count)`` takes the number of updates already made; a run of
T steps uses counts 0 to T - 1; from ``schedule(T)`` on, the value stays at its end. Boundaries
are Python integers, checked when a schedule is built. The arithmetic is float32 and gives the same
bits for one count and for many, jitted or not.
"""

from ._schedule import Schedule
from .averages import (
    AverageState,
    ParameterAverage,
    UpdateWeights,
    decay_of_merge,
    ema,
    ema_weights,
    lawa,
    merge,
    merge_weights,
    update_weights,
)
from .batch_size import BatchSizes, batch_ramp, follow_data, seesaw
from .cycles import cyclic, one_cycle, restarts, sgdr
from .half_lives import decay_rate, ema_horizon, half_life, half_life_in_tokens, momentum
from .horizonless import inverse_sqrt, noam, power_law, t5
from .operators import anneal_from, join, product, ramp, repeat, rewarm, shift, warmup
from .piecewise import piecewise, step_decay
from .plateaus import infinite_cosine, wsd, wsd_s
from .plot import describe, plot
from .registry import for_run, parse_options, schedule_names
from .scaling import (
    scale_beta,
    scale_eps,
    scale_learning_rate,
    scale_weight_decay,
    scale_with_width,
    time_scale,
)
from .shapes import (
    constant,
    cosine,
    decay,
    decay_to_zero,
    exponential,
    inverse,
    linear,
    mirror_cosine,
    one_minus_sqrt,
    polynomial,
    square,
)
from .units import Duration, Run, examples, fraction, steps, tokens
from .weight_decay import adamc_decay, coupled_decay, decay_to_none, independent_decay

__all__ = [
    "AverageState",
    "BatchSizes",
    "Duration",
    "ParameterAverage",
    "Run",
    "Schedule",
    "UpdateWeights",
    "adamc_decay",
    "anneal_from",
    "batch_ramp",
    "constant",
    "cosine",
    "coupled_decay",
    "cyclic",
    "decay",
    "decay_of_merge",
    "decay_rate",
    "decay_to_none",
    "decay_to_zero",
    "describe",
    "ema",
    "ema_horizon",
    "ema_weights",
    "examples",
    "exponential",
    "follow_data",
    "for_run",
    "fraction",
    "half_life",
    "half_life_in_tokens",
    "independent_decay",
    "infinite_cosine",
    "inverse",
    "inverse_sqrt",
    "join",
    "lawa",
    "linear",
    "merge",
    "merge_weights",
    "mirror_cosine",
    "momentum",
    "noam",
    "one_cycle",
    "one_minus_sqrt",
    "parse_options",
    "piecewise",
    "plot",
    "polynomial",
    "power_law",
    "product",
    "ramp",
    "repeat",
    "restarts",
    "rewarm",
    "scale_beta",
    "scale_eps",
    "scale_learning_rate",
    "scale_weight_decay",
    "scale_with_width",
    "schedule_names",
    "seesaw",
    "sgdr",
    "shift",
    "square",
    "step_decay",
    "steps",
    "t5",
    "time_scale",
    "tokens",
    "update_weights",
    "warmup",
    "wsd",
    "wsd_s",
]
