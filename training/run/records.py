"""The records in `metrics.jsonl`: read strictly, and audited for what is lost or doubled."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..config import RunConfig

Record = dict[str, float]


def read_records(file: Path) -> list[Record]:
    """The records of a file, whose last line may be cut off; ``null`` reads as NaN.

    Raises:
      ValueError: for any other line that is no record, by its number.
    """
    records = []
    lines = file.read_bytes().split(b"\n")[
        :-1
    ]  # after the last newline: nothing, or what was cut off
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            records.append({k: math.nan if v is None else v for k, v in entry.items()})
            if not isinstance(entry["step"], int):
                raise TypeError
            float(entry["seconds"])
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(
                f"{file} is damaged (line {number} is no record); remove the line, and the run goes on "
                "without it."
            ) from None
    return records


def up_to(records: list[Record], step: int) -> list[Record]:
    """The records that had been written when a checkpoint of `step` was.

    After a roll-back steps are there twice: what counts is where the run was at `step` last.
    """
    trained = (i for i, entry in enumerate(records) if "heldout_loss" not in entry)
    ends = [i for i in trained if _follows(records[i]) == step]
    if not ends:
        return [entry for entry in records if entry["step"] < step]
    end = ends[-1] + 1
    while end < len(records) and "heldout_loss" in records[end] and records[end]["step"] == step:
        end += 1
    return records[:end]


def audited(
    records: list[Record],
    run: RunConfig,
    until: int,
    periods: Sequence[tuple[int, int]] = (),
) -> tuple[list[Record], list[str]]:
    """The records once each, and what is lost or doubled among those of the steps before `until`.

    Args:
      records: as they were written.
      run: its configuration.
      until: the step after the last one.
      periods: pairs of a step and the updates between two evaluations after it; by default the run's.
    """
    kept, lost, doubled = [], [], []
    expected: float = 0
    evaluated: set[float] = set()
    for entry in records:
        step = entry["step"]
        if "heldout_loss" in entry:
            if step in evaluated:
                doubled.append(f"the evaluation after {step:,}")
                continue
            evaluated.add(step)
        elif step < expected:
            doubled.append(f"step {step:,}")
            continue
        else:
            if step > expected:
                lost.append(_steps(expected, step - 1))
            expected = _follows(entry)
            if "returned_to" in entry:
                evaluated = {seen for seen in evaluated if seen <= expected}
        kept.append(entry)
    if expected < until:
        lost.append(_steps(expected, until - 1))
    periods = periods or [(0, run.eval_every)]
    ends = [start for start, _ in periods[1:]] + [until]
    due = {until} if until == run.updates else set()
    for (start, every), end in zip(periods, ends, strict=True):
        due |= {step for step in range(every, min(end, until) + 1, every) if step > start}
    lost += [f"the evaluation after {step:,}" for step in sorted(due - evaluated)]
    return kept, [*_listed(lost, "lost"), *_listed(doubled, "doubled, and the first ones count")]


def warn(file: Path, complaints: list[str]) -> None:
    """Says what is wrong with the records; curves and times are drawn from what is there."""
    if complaints:
        warnings.warn(
            f"{file}: of its records {'; '.join(complaints)}. The run itself is not affected.",
            stacklevel=2,
        )


def _follows(entry: Record) -> float:
    """The step after that of a record of training."""
    return entry.get("returned_to", entry["step"] + 1)


def _steps(first: float, last: float) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _listed(found: list[str], what: str) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{', '.join(found[:3])}{more} are {what}"]
