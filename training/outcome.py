"""What a run leaves behind: its records as they are made, its summary at the end."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

from .processes import is_first

Status = Literal["finished", "diverged", "interrupted"]


@dataclasses.dataclass
class Outcome:
    """What a run left behind, filled while it goes on."""

    name: str
    learning_rate: float
    status: Status = "interrupted"
    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    compile_seconds: float = math.nan
    optimizer_milliseconds: float = math.nan
    state_bytes_per_parameter: float = math.nan
    parameters: int = 0

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

    def save(self, folder: Path) -> None:
        """Writes ``outcome.json``: all but the records, which ``metrics.jsonl`` holds."""
        summary = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del summary["steps"], summary["evaluations"]
        _replace(folder / "outcome.json", json.dumps(summary, indent=2) + "\n")

    def load(self, folder: Path) -> bool:
        """Reads back what `save` wrote; false if the run in `folder` never came to its end."""
        if not (folder / "outcome.json").exists():
            return False
        for name, value in json.loads((folder / "outcome.json").read_text("utf-8")).items():
            setattr(self, name, value)
        for entry in _records(folder / "metrics.jsonl"):
            (self.evaluations if "heldout_loss" in entry else self.steps).append(entry)
        return True


def _records(metrics_file: Path) -> list[dict[str, float]]:
    """The records of a file whose last line may be cut off."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def take_up(metrics_file: Path, outcome: Outcome, step: int) -> float:
    """Keeps the records up to a restored `step`; returns the seconds of training they took."""
    kept = []
    if metrics_file.exists() and step > 0:
        for entry in _records(metrics_file):
            evaluation = "heldout_loss" in entry
            if entry["step"] < step or (evaluation and entry["step"] == step):
                kept.append(entry)
                (outcome.evaluations if evaluation else outcome.steps).append(entry)
    if is_first():
        _replace(metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
    return max((entry["seconds"] for entry in kept), default=0.0)


def _replace(file: Path, text: str) -> None:
    """Writes a file that is there whole, or as it was before."""
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)
