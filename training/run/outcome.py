"""The outcome of a run: its records as they are made, its summary at the end."""

import dataclasses
import itertools
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from ...schedules import BatchSizes
from ..config import RunConfig
from .files import read_json, write_json
from .records import audited, read_records, up_to, warn

Status = Literal["finished", "diverged", "interrupted"]


class RunFailed(RuntimeError):
    """Why a race cannot go on that is not an optimizer's divergence; what had ended is kept."""


@dataclasses.dataclass
class Outcome:
    """The outcome of a run, filled while it goes on."""

    name: str
    learning_rate: float
    repeat: int = 0
    status: Status = "interrupted"
    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    compile_seconds: float = math.nan
    optimizer_milliseconds: float = math.nan
    state_bytes_per_parameter: float = math.nan
    parameters: int = 0
    trials: int = 0
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=dict)  # fields of `Cost`
    samples: list[str] = dataclasses.field(default_factory=list)
    batch_sizes: BatchSizes | None = None  # of this run, with its own warm-up; known once it begins

    @property
    def step_milliseconds(self) -> float:
        """Median time of a step: training only, without compilation and evaluation."""
        seconds = [entry["seconds"] for entry in self.steps]
        gaps = [b - a for a, b in itertools.pairwise(seconds)] or seconds
        return 1e3 * statistics.median(gaps) if gaps else math.nan

    @property
    def final_loss(self) -> float:
        """Held-out loss of the last evaluation; infinite for a run that diverged."""
        if self.status == "diverged" or not self.evaluations:
            return math.inf
        return self.evaluations[-1]["heldout_loss"]

    def reaching(self, loss: float) -> dict[str, float] | None:
        """Steps and seconds at which the held-out loss first came down to `loss`.

        Interpolated linearly between evaluations; ``None`` if it never did.
        """
        before: dict[str, float] | None = None
        for after in self.evaluations:
            if after["heldout_loss"] <= loss:
                if before is None or before["heldout_loss"] == after["heldout_loss"]:
                    return {"step": after["step"], "seconds": after["seconds"]}
                gap = before["heldout_loss"] - after["heldout_loss"]
                share = (before["heldout_loss"] - loss) / gap
                return {
                    key: before[key] + share * (after[key] - before[key])
                    for key in ("step", "seconds")
                }
            before = after
        return None

    def tokens(self, updates: float, run: RunConfig) -> int:
        """Tokens seen in so many updates, a fraction of one included, in the batches of this run.

        A run that has not begun has the batches of `run`.
        """
        sizes, whole = self.batch_sizes or run.batch_sizes, int(updates)
        examples = sizes.data_offset(whole) + (updates - whole) * sizes.at(whole)
        return round(examples * run.model.context)

    def save(self, folder: Path) -> None:
        """Writes ``outcome.json``: all but the records, which ``metrics.jsonl`` holds."""
        write_json(folder / "outcome.json", {name: getattr(self, name) for name in _saved()})

    def load(self, folder: Path, run: RunConfig) -> bool:
        """Reads back what `save` wrote; false if the run in `folder` never came to its end.

        Records that are lost or doubled are warned of.

        Raises:
          ValueError: for a file that is damaged, by its name.
        """
        file, metrics_file = folder / "outcome.json", folder / "metrics.jsonl"
        if not file.exists():
            if metrics_file.exists():
                read_records(metrics_file)
            return False
        fix = "remove it, and the run goes on from its newest checkpoint or starts again"
        summary = read_json(file, fix)
        if set(summary) != set(_saved()) or (
            summary["name"] != self.name or summary["repeat"] != self.repeat
        ):
            raise ValueError(f"{file} is damaged (not an outcome of {self.name}); {fix}.")
        if not metrics_file.exists():
            raise ValueError(f"{metrics_file} is missing; remove {file}, and {fix[11:]}.")
        if summary["status"] == "finished" and _steps_in(folder, run) < run.steps:
            return False  # it goes on: the race became longer
        for name, value in summary.items():
            setattr(self, name, math.nan if value is None else value)
        self.batch_sizes = run.batch_sizes
        entries = read_records(metrics_file)
        until = run.updates if self.status == "finished" else 0
        entries, complaints = audited(entries, run, until, periods_in(folder))
        warn(metrics_file, complaints)
        self.add(entries)
        return True

    def take_up(
        self, metrics_file: Path | None, run: RunConfig, step: int
    ) -> list[dict[str, float]]:
        """Keeps the records up to a restored `step`, and returns them; the file is left as it is.

        Records that are lost or doubled are warned of. A process that writes none has no file.
        """
        self.batch_sizes = run.batch_sizes
        if metrics_file is None:
            return []
        if step == 0 or not metrics_file.exists():
            entries, complaints = [], ["all records are lost"] if step else []
        else:
            entries, complaints = audited(
                up_to(read_records(metrics_file), step),
                run,
                step,
                periods_in(metrics_file.parent),
            )
        warn(metrics_file, complaints)
        self.add(entries)
        return entries

    def add(self, entries: list[dict[str, float]]) -> None:
        """Takes records in, training's and evaluations'."""
        for entry in entries:
            (self.evaluations if "heldout_loss" in entry else self.steps).append(entry)


def _saved() -> list[str]:
    """The fields of ``outcome.json``."""
    elsewhere = {"steps", "evaluations", "samples", "batch_sizes"}
    return [f.name for f in dataclasses.fields(Outcome) if f.name not in elsewhere]


def periods_in(folder: Path) -> list[tuple[int, int]]:
    """From which step on a run was evaluated how often, as its ``meta.json`` has it; else none."""
    try:
        return [
            (start, every) for start, every in read_json(folder / "meta.json", "")["evaluations"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _steps_in(folder: Path, run: RunConfig) -> int:
    """The planned number of steps of a run, from its ``meta.json``."""
    try:
        return int(read_json(folder / "meta.json", "")["run"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return run.steps
