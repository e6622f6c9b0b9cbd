"""Every schedule, built for a run of 1,000 updates: the rows of the common tests."""

from typing import NamedTuple

import optax
from ravine import schedules as s

from .tolerances import UNIT

STEPS, PEAK = 1000, 3e-3
SCHEDULE = 8 * UNIT
"""How far rounding takes a schedule whose values are at most 1.

An angle y has four roundings, each of which moves half its cosine by y sin(y) / 2 < 1 unit; the cosine
itself, the products and the sums after it are the other four.
"""


class Row(NamedTuple):
    build: object
    end: float | None = None  # schedule(STEPS), for schedules that end there
    falls: bool = False


def row(function, *args, end=None, falls=False, **kwargs):
    return Row(lambda: function(PEAK, *args, **kwargs), end, falls)


SHAPES = {
    "constant": row(s.constant, end=PEAK),
    "linear": row(s.linear, STEPS, 0.1, end=0.1 * PEAK, falls=True),
    "decay_to_zero": row(s.decay_to_zero, STEPS, end=0.0, falls=True),
    "polynomial": row(s.polynomial, STEPS, 0.1, exponent=1.7, end=0.1 * PEAK, falls=True),
    "cosine": row(s.cosine, STEPS, 0.1, end=0.1 * PEAK, falls=True),
    "cosine, power": row(s.cosine, STEPS, 0.1, exponent=1.5, end=0.1 * PEAK, falls=True),
    **{
        f"decay, {shape}": row(s.decay, STEPS, shape, 0.07, end=0.07 * PEAK, falls=True)
        for shape in (
            "linear",
            "1-sqrt",
            "cosine",
            "square",
            "mirror-cosine",
            "inverse",
            "exponential",
        )
    },
    "inverse_sqrt": row(s.inverse_sqrt, 77, falls=True),
    "noam": row(s.noam, 77),
    "t5": row(s.t5, 77, falls=True),
    "power_law": row(s.power_law, 65536, 128, falls=True),
    "sgdr": row(s.sgdr, STEPS, 0.01, first_period=30, period_factor=1.5, peak_factor=0.9),
    "sgdr, equal": row(s.sgdr, STEPS, 0.01, first_period=30, period_factor=1, peak_factor=0.9),
    "sgdr, many": row(s.sgdr, STEPS, first_period=10, period_factor=1, peak_factor=0.99),
    "sgdr, default": row(s.sgdr, STEPS),
    "cyclic": row(s.cyclic, 37),
    "cyclic, triangular2": row(s.cyclic, 37, 50, mode="triangular2"),
    "cyclic, exp_range": row(s.cyclic, 37, mode="exp_range", factor=0.99),
    "one_cycle": row(s.one_cycle, STEPS, end=4e-6 * PEAK),
    "one_cycle, linear": row(s.one_cycle, STEPS, shape="linear", end=4e-6 * PEAK),
    "piecewise": row(s.piecewise, [10, 50, STEPS], [0.3, 0.4, 0.01], end=0.01 * PEAK),
    "piecewise, linear": row(
        s.piecewise, [10, 50, STEPS], [0.3, 0.4, 0.01], interpolate="linear", end=0.01 * PEAK
    ),
    "piecewise, cosine": row(
        s.piecewise, [10, 50, STEPS], [0.3, 0.4, 0.01], interpolate="cosine", end=0.01 * PEAK
    ),
    "step_decay": row(s.step_decay, 70, 0.3, falls=True),
    "wsd": row(s.wsd, STEPS, 0.05, end=0.05 * PEAK, falls=True),
    "wsd_s": row(s.wsd_s, STEPS, end=0.1 * PEAK),
    "infinite_cosine": row(s.infinite_cosine, STEPS, end=0.01 * PEAK, falls=True),
}

OPERATORS = {
    **{
        f"warmup, {shape}": Row(
            lambda shape=shape: s.warmup(
                s.cosine(PEAK, 900, 0.1), 100, shape=shape, start_ratio=0.01
            ),
            0.1 * PEAK,
        )
        for shape in ("linear", "cosine", "1-sqrt", "exponential")
    },
    "warmup, from zero": Row(lambda: s.warmup(s.linear(PEAK, 900), 100, from_zero=True), 0.0),
    "ramp": Row(lambda: s.ramp(0.85, 0.95, STEPS), 0.95),
    "join": Row(lambda: s.join([s.constant(PEAK), s.linear(PEAK, 700)], [300]), 0.0),
    "join, optax": Row(
        lambda: s.join([optax.constant_schedule(PEAK), s.linear(PEAK, 700)], [300]), 0.0
    ),
    "product": Row(
        lambda: s.product(s.inverse_sqrt(PEAK, 77), s.linear(1.0, STEPS), s.ramp(0.1, 1.0, 100)),
        0.0,
    ),
    "anneal_from": Row(lambda: s.anneal_from(s.cosine(PEAK, 2000), 900, 100), 0.0),
    "rewarm": Row(
        lambda: s.rewarm(s.cosine(PEAK, 500), 400, 100, s.exponential(PEAK / 3, 500, 0.1)),
        0.1 * PEAK / 3,
    ),
    "shift": Row(lambda: s.shift(s.cosine(PEAK, 900, 0.1), 100), 0.1 * PEAK),
    "repeat": Row(lambda: s.repeat(s.cosine(PEAK, 100, 0.1), 100, 10), 0.1 * PEAK),
}

SCHEDULES = {**SHAPES, **OPERATORS}
