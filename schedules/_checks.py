"""Checks when a schedule is built: each error names the problem and the fix in one sentence."""

import itertools
from collections.abc import Sequence
from typing import Any

from ..core.checks import check_whole


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
