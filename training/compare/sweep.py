"""The command `python -m ravine sweep`: every optimizer tuned with the same number of trials."""

import dataclasses
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...core.checks import near
from ...optimizers.registry import OptimizerConfig, names
from ..config import RunConfig, check_repeats
from ..data.bpe import corpus_of
from ..identity import to_json
from ..run import interrupts
from ..run.files import Lines, read_lines, write_json
from ..run.meta import provenance
from .space import Point, points
from .trial import UNTOLD, Trials, check_used

HERE = Path(__file__).parent
TRIALS, TUNED = HERE / "trials.jsonl", HERE / "tuned.json"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Tunes every optimizer with the same number of quasi-random trials, over the same kind of space.

    Every trial is a line of --out, written when it ends; a sweep that was stopped goes on with what is
    missing. The best trial of the last rung becomes an optimizer's row in the table that races use:
    --derive writes it.
    """

    optimizers: str = "adamw,muon,shampoo,soap,lion,sgd"
    """Names, separated by commas; "all" for every registered one."""
    trials: int = 16
    """Trials of the first rung, for every optimizer."""
    rungs: tuple[int, ...] = (175, 700)
    """Steps of a trial, rung by rung: after each, the best quarter goes on to the next, from the start,
    with a schedule of the new length. One number: no halving."""
    sample_seed: int = 0
    """Of the quasi-random points."""
    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(seed=1000, eval_batches=32)
    )
    """Model, text, batch and seed; races have other seeds and other held-out text."""
    out: Path = Path("runs/trials.jsonl")
    """File of strict JSON lines, one per trial."""
    derive: bool = False
    """Only derive the table of races from the committed trials, training/compare/trials.jsonl."""

    def __post_init__(self) -> None:
        check_repeats(trials=self.trials)
        if not self.rungs or min(self.rungs) < 1 or list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs must be rising numbers of steps, got {list(self.rungs)}.")
        check_used(self.run)
        self.line_up()

    def line_up(self) -> tuple[str, ...]:
        """Names of the optimizers.

        Raises:
          ValueError: for unknown or repeated ones.
        """
        if self.optimizers.strip() == "all":
            return names()
        wanted = [name.strip() for name in self.optimizers.split(",") if name.strip()]
        for name in wanted:
            if name not in names():
                raise ValueError(f"unknown optimizer {name!r}; {near(name, names())}")
        if not wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"optimizers must be named once each, got {self.optimizers!r}.")
        return tuple(wanted)


def sweep(config: SweepConfig, console: Console) -> None:
    """Runs the trials that are missing, and prints the best of every optimizer.

    Raises:
      ValueError: for a configuration, a text or a file of trials that cannot be used.
    """
    if config.derive:
        write_json(TUNED, derived(read_trials(TRIALS)))
        console.print(f"wrote {TUNED}", highlight=False, markup=False, soft_wrap=True)
        return
    corpus = corpus_of(config.run).for_tuning()
    model = dataclasses.replace(config.run.model, vocabulary=corpus.vocabulary)
    trials = Trials(dataclasses.replace(config.run, model=model), corpus)
    task = _task(config, corpus.fingerprint)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_trials(config.out) if config.out.exists() else []
    known = {_key(row): row for row in rows}
    source = {**provenance(), "text": corpus.description, "command": " ".join(sys.argv[1:])}
    lines = Lines(config.out)
    try:
        for name in config.line_up():
            here = list(enumerate(points(name, config.trials, config.sample_seed)))
            for index, steps in enumerate(config.rungs):
                losses = {}
                for number, point in here:
                    interrupts.check()
                    row = {"optimizer": name, "trial": number, "steps": steps, "task": task}
                    if _key(row) not in known:
                        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                        loss = trials.loss(point, steps)
                        row |= _told(point) | {"heldout_loss": loss, "seed": config.run.seed}
                        row |= {"sample_seed": config.sample_seed, "started": started, **source}
                        known[_key(row)] = row
                        lines.write(row)
                        console.print(
                            f"{name:<14} {steps:>5} steps, trial {number:>3}: {loss:.4f} nats",
                            highlight=False,
                        )
                    loss = known[_key(row)]["heldout_loss"]
                    losses[number] = math.inf if loss is None else loss
                kept = max(1, math.ceil(len(here) / 4)) if index + 1 < len(config.rungs) else 1
                here = sorted(here, key=lambda entry: losses[entry[0]])[:kept]
    finally:
        lines.close()
    # The file may have trials of other tasks, whose losses are not comparable, and of longer rungs.
    mine = [r for r in known.values() if r["task"] == task and r["steps"] in config.rungs]
    console.print(_table(derived(mine)))


def read_trials(file: Path) -> list[dict[str, Any]]:
    """The trials in a file.

    Raises:
      ValueError: for a line that is no trial, by its number.
    """

    def take(row: dict[str, Any]) -> dict[str, Any]:
        if not {"heldout_loss", "learning_rate"} <= row.keys() or not _key(row):
            raise KeyError
        return row

    return read_lines(file, take, "remove that line, and its trial is run again")


def derived(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The table that races use: of every optimizer, its best trial among those with most steps."""
    rows = list(rows)
    table: dict[str, Any] = {}
    for name in sorted({row["optimizer"] for row in rows}):
        mine = [row for row in rows if row["optimizer"] == name]
        steps = max(row["steps"] for row in mine)
        last = [row for row in mine if row["steps"] == steps and row["heldout_loss"] is not None]
        if not last:
            continue
        best = min(last, key=lambda row: row["heldout_loss"])
        rates = sorted(row["learning_rate"] for row in mine)
        table[name] = {
            "learning_rate": best["learning_rate"],
            "weight_decay": best["weight_decay"],
            "warmup": best["warmup"],
            "hyperparameters": best["hyperparameters"],
            "heldout_loss": best["heldout_loss"],
            "steps": steps,
            "trials": len({row["trial"] for row in mine}),
            "learning_rates_searched": [rates[0], rates[-1]],
        }
    how = "python -m ravine sweep --derive, from trials.jsonl: do not edit"
    return {"how": how, "optimizers": table}


def _told(point: Point) -> dict[str, Any]:
    told = dataclasses.asdict(dataclasses.replace(point, optimizer=OptimizerConfig("sgd")))
    del told["optimizer"]
    return told | {"hyperparameters": json.loads(point.optimizer.to_json())["hyperparameters"]}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["optimizer"], row["trial"], row["steps"], row["task"]


def _task(config: SweepConfig, fingerprint: str) -> str:
    """What all trials of a sweep have in common; numbers of another task are not comparable."""
    run = to_json(dataclasses.replace(config.run, steps=1, **UNTOLD))
    text = json.dumps([run, fingerprint, config.sample_seed, config.trials], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _table(table: Mapping[str, Any]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD)
    for column in (
        "optimizer",
        "held-out",
        "rate",
        "decay",
        "warm-up",
        "hyperparameters",
        "trials",
    ):
        shown.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, row in sorted(table["optimizers"].items(), key=lambda item: item[1]["heldout_loss"]):
        numbers = [f"{row[key]:.3g}" for key in ("learning_rate", "weight_decay", "warmup")]
        values = " ".join(f"{key}={value}" for key, value in row["hyperparameters"].items())
        shown.add_row(name, f"{row['heldout_loss']:.3f}", *numbers, values, str(row["trials"]))
    return shown
