"""The command `python -m ravine sensitivity`: what a learning rate beside the best one costs."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..config import RunConfig, check_repeats
from .entrants import line_up
from .runs import Runs, kept_losses
from .trial import check_used


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """Held-out losses over learning rates around each optimizer's tuned one.

    Everything else stays as tuned, the share of a matrix that decay removes per step included. Every run
    is a line of --out, and a later call goes on.
    """

    optimizers: str = "adamw,muon,shampoo,soap,lion,sgd"
    """Names, separated by commas; tuned ones."""
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Of the tuned learning rate."""
    length: int = 700
    """Steps of every schedule."""
    seeds: int = 1
    """Runs of each."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    """Model, text, batch and first seed."""
    out: Path = Path("runs/sensitivity.jsonl")
    """Strict JSON lines, a run each."""

    def __post_init__(self) -> None:
        bad = [f for f in self.factors if not (math.isfinite(f) and f > 0)]
        if bad or len(set(self.factors)) < len(self.factors) or 1.0 not in self.factors:
            raise ValueError(
                f"factors must be positive, once each, and 1 among them, got {list(self.factors)}."
            )
        check_repeats(seeds=self.seeds)
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}.")
        check_used(self.run)
        line_up(self.optimizers)


def sensitivity(config: SensitivityConfig, console: Console) -> None:
    """Runs what is missing, and prints the table.

    Raises:
      ValueError: for a configuration, a text or a file of runs that cannot be used.
    """
    found: dict[str, dict[float, float]] = {}
    with kept_losses(config.run, config.out) as (corpus, kept):
        runs = Runs(config.run, corpus, kept, console)
        for entrant in line_up(config.optimizers):
            for factor in sorted(config.factors):
                tried = dataclasses.replace(entrant, learning_rate=factor * entrant.learning_rate)
                losses = [runs.loss(tried, repeat, config.length) for repeat in range(config.seeds)]
                found.setdefault(entrant.name, {})[factor] = statistics.fmean(losses)
    console.print(_table(found))


def width(losses: Mapping[float, float], most: float = 0.02) -> float:
    """The factor by which learning rates may differ at a given cost in nats above the best.

    Straight lines between the tried rates, on a logarithmic axis; up to the ends of what was tried.

    Example:
      >>> from ravine.training.compare.sensitivity import width
      >>> round(width({0.5: 1.04, 1.0: 1.0, 2.0: 1.04}), 2)
      2.0
    """
    factors = sorted(losses)
    best = min(factors, key=losses.__getitem__)
    bound = losses[best] + most

    def end(towards: list[float]) -> float:
        inside = best
        for outside in towards:
            if losses[outside] > bound:
                rise = losses[outside] - losses[inside]
                share = (bound - losses[inside]) / rise if math.isfinite(rise) else 0.0
                return inside * (outside / inside) ** share
            inside = outside
        return inside

    at = factors.index(best)
    return end(factors[at + 1 :]) / end(factors[:at][::-1])


def _table(found: Mapping[str, Mapping[float, float]]) -> Table:
    caption = (
        "held-out loss by factor of the tuned learning rate; within 0.02: by what factor rates may "
        "differ at most that far above the best"
    )
    table = Table(caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("optimizer")
    for factor in next(iter(found.values())):
        table.add_column(f"x {factor:g}", justify="right")
    table.add_column("within 0.02", justify="right")
    for name, losses in sorted(found.items(), key=lambda item: -width(item[1])):
        cells = (f"{loss:.3f}" if math.isfinite(loss) else "diverged" for loss in losses.values())
        table.add_row(name, *cells, f"x {width(losses):.1f}")
    return table
