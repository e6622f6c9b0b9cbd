"""Functions `count -> value`, for whatever a run changes over time.

The conventions, fixed once: ``schedule(count)`` takes the number of updates already made; a run of
T steps uses counts 0 to T - 1; ``schedule(T)`` is the end value and stays so. Boundaries are Python
integers, checked when a schedule is built. The arithmetic is float32 that gives the same bits for
one count and for many, jitted or not.
"""

from ._schedule import Schedule
from .cycles import cyclic, one_cycle, restarts, sgdr
from .horizonless import inverse_sqrt, noam, power_law, t5
from .operators import anneal_from, join, product, ramp, repeat, rewarm, shift, warmup
from .piecewise import piecewise, step_decay
from .plateaus import infinite_cosine, wsd, wsd_s
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

__all__ = [
    "Schedule",
    "anneal_from",
    "constant",
    "cosine",
    "cyclic",
    "decay",
    "decay_to_zero",
    "exponential",
    "infinite_cosine",
    "inverse",
    "inverse_sqrt",
    "join",
    "linear",
    "mirror_cosine",
    "noam",
    "one_cycle",
    "one_minus_sqrt",
    "piecewise",
    "polynomial",
    "power_law",
    "product",
    "ramp",
    "repeat",
    "restarts",
    "rewarm",
    "sgdr",
    "shift",
    "square",
    "step_decay",
    "t5",
    "warmup",
    "wsd",
    "wsd_s",
]
