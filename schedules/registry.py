"""Schedules by name, with arguments taken from the run: the choices of `--schedule`."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..core.arguments import checked
from ..core.checks import check_name, check_whole
from ._checks import check_fits
from ._schedule import Schedule
from .cycles import cyclic, one_cycle, sgdr
from .horizonless import inverse_sqrt, noam, power_law, t5
from .operators import warmup
from .piecewise import piecewise, step_decay
from .plateaus import infinite_cosine, wsd, wsd_s
from .shapes import (
    constant,
    cosine,
    decay_to_zero,
    exponential,
    inverse,
    linear,
    mirror_cosine,
    one_minus_sqrt,
    polynomial,
    square,
)

_BUILDERS: dict[str, Callable[..., Schedule]] = {
    builder.__name__: builder
    for builder in (
        constant,
        linear,
        decay_to_zero,
        polynomial,
        cosine,
        exponential,
        inverse,
        one_minus_sqrt,
        square,
        mirror_cosine,
        inverse_sqrt,
        noam,
        t5,
        power_law,
        sgdr,
        cyclic,
        one_cycle,
        piecewise,
        step_decay,
        wsd,
        wsd_s,
        infinite_cosine,
    )
}
_RISE_BY_THEMSELVES = ("noam", "cyclic", "one_cycle")


def schedule_names() -> tuple[str, ...]:
    """The names that :func:`for_run` takes.

    Example:
      >>> import ravine
      >>> "wsd" in ravine.schedules.schedule_names()
      True
    """
    return tuple(_BUILDERS)


@checked
def parse_options(name: str, text: str) -> dict[str, Any]:
    """Options of a schedule from words such as ``decay_steps=60, shape=1-sqrt``.

    Args:
      name: a schedule's name.
      text: ``name=value`` pairs, separated by commas; lists in brackets.

    Raises:
      ValueError: for an unknown schedule or option, or text that is not a pair.

    Example:
      >>> import ravine
      >>> ravine.schedules.parse_options("wsd_s", "periods=[30, 70], shape=1-sqrt")
      {'periods': [30, 70], 'shape': '1-sqrt'}
    """
    check_name("schedule", name, _BUILDERS)
    known = list(inspect.signature(_BUILDERS[name]).parameters)[1:]
    options: dict[str, Any] = {}
    for pair in filter(None, (word.strip() for word in re.split(r",(?![^\[]*\])", text))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"an option of a schedule is written name=value, got {pair!r}.")
        check_name(f"option of {name}", key, known)
        if key in options:
            raise ValueError(f"the option {key} of {name} is given twice; give it once.")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


@checked
def for_run(
    name: str,
    peak: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    end_ratio: float | None = None,
    batch_size: int = 1,
    context: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Schedule:
    """A schedule by name over a whole run, with a linear warm-up in front.

    ``"noam"`` and ``"wsd"`` take the warm-up as their own; ``"cyclic"`` and ``"one_cycle"`` rise by
    themselves and have none. Arguments without a default are taken from the run: a third of
    it for `every`, an eighth for `rise_steps`, the warm-up for `timescale`, and drops to a tenth and
    a hundredth at its half and three quarters for ``"piecewise"`` (He et al., 2016).

    Args:
      name: one of :func:`schedule_names`.
      peak: the highest value.
      steps: the length of the run, warm-up included.
      warmup_steps: updates of the warm-up.
      end_ratio: the share of the peak at the end; by default the schedule's own.
      batch_size: examples per update.
      context: tokens per example.
      options: arguments of the schedule that replace all of these.

    Raises:
      ValueError: for an unknown name or option and values out of range.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.for_run("wsd", 1.0, 100, warmup_steps=10)
      >>> ravine.schedules.describe(schedule)
      'linear warm-up, then constant, then 1 - sqrt: 0.1 at 0, 1 at 9, 1 at 10, 1 at 80, 0 at 100'
    """
    check_name("schedule", name, _BUILDERS)
    check_whole(0, warmup_steps=warmup_steps)
    check_fits({"warmup_steps": warmup_steps, "at least one update of the body": 1}, steps)
    builder = _BUILDERS[name]
    accepted = inspect.signature(builder).parameters
    own = "warmup_steps" in accepted or name in _RISE_BY_THEMSELVES
    body_steps = steps if own else steps - warmup_steps
    known: dict[str, Any] = {
        "steps": body_steps,
        "warmup_steps": warmup_steps if name != "noam" else max(1, warmup_steps),
        "batch_size": batch_size,
        "tokens_per_step": batch_size * context,
        "every": max(1, body_steps // 3),
        "rise_steps": max(1, body_steps // 8),
        "timescale": max(1, warmup_steps),
        "boundaries": (max(1, body_steps // 2), max(2, 3 * body_steps // 4)),
        "ratios": (0.1, 0.01),
    }
    if end_ratio is not None:
        known["end_ratio"] = end_ratio
    known.update(options or {})
    arguments = {key: value for key, value in known.items() if key in accepted}
    for key in options or {}:
        check_name(f"option of {name}", key, list(accepted)[1:])
    body = builder(peak, **arguments)
    return body if own else warmup(body, warmup_steps)
