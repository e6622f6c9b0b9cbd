"""Refusals when a schedule is built: one sentence that names the culprit and the mend."""

import difflib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether `value` is a Python integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(least: int, **values: Any) -> None:
    """Raises unless every value is a Python integer of at least `least`."""
    for name, value in values.items():
        if not is_whole(value) or value < least:
            mend = f"; give int({name})" if isinstance(value, float) else ""
            raise ValueError(
                f"{name} must be a whole number of at least {least}, got {value!r}{mend}."
            )


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_finite(**values: Any) -> None:
    """Raises unless every value is a finite number."""
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(f"{name} must be finite, got {value!r}.")


def check_positive(**values: Any) -> None:
    """Raises unless every value is finite and more than zero."""
    for name, value in values.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def check_ratio(**values: Any) -> None:
    """Raises unless every value lies in [0, 1]."""
    for name, value in values.items():
        if not is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}.")


def check_fits(phases: dict[str, int], steps: int) -> None:
    """Raises when the phases together are longer than the run."""
    total = sum(phases.values())
    if total > steps:
        parts = " + ".join(f"{name} {length}" for name, length in phases.items())
        raise ValueError(
            f"the phases are longer than the run: {parts} = {total} updates, but steps is {steps}; "
            "shorten a phase or raise steps."
        )


def check_boundaries(boundaries: Sequence[Any]) -> tuple[int, ...]:
    """The boundaries as a tuple, or a `ValueError` unless they are counts in rising order."""
    for boundary in boundaries:
        check_whole(1, boundaries=boundary)
    for before, after in itertools.pairwise(boundaries):
        if after <= before:
            raise ValueError(
                f"boundaries must rise, but {after} follows {before}; sort them and leave out "
                "phases of no length."
            )
    return tuple(boundaries)


def check_length(name: str, values: Sequence[Any], length: int, why: str) -> None:
    """Raises unless the list has the length it must have."""
    if len(values) != length:
        raise ValueError(f"{name} must have {length} entries, {why}, got {len(values)}.")


def check_name(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises unless `name` is known, with those that are near it."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        mend = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."
        raise ValueError(f"unknown {what} {name!r}; {mend}")
