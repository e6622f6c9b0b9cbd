"""The command `python -m ravine speedup`: how many of AdamW's tokens a rival's schedule is worth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from ..config import RunConfig, check_repeats
from .entrants import Entrant, line_up
from .runs import Runs, kept_losses
from .summary import REFERENCE
from .trial import check_used


@dataclasses.dataclass(frozen=True)
class SpeedupConfig:
    """Speed-up is the ratio of tokens that AdamW needs, at the end of a whole schedule.

    AdamW trains with schedules of several lengths, each to its end, and its loss is fitted as a function
    of the tokens, a + b D^-c. Rivals train with one length; where AdamW's curve has their loss, one
    reads how many tokens AdamW needs for it. Every run is a line of --out, and a later call goes on.
    """

    optimizers: str = "muon,shampoo,soap,lion,sgd"
    """Rivals, separated by commas; tuned ones."""
    horizons: tuple[int, ...] = (175, 350, 700, 1400, 2800)
    """Steps of the reference's schedules; four or more."""
    factors: tuple[float, ...] = (1.0,)
    """AdamW's learning rates at every horizon, as multiples of the tuned one: the best of each counts.
    It is chosen on the text on which it is compared, which favours AdamW a little."""
    length: int = 700
    """Steps of the rivals' schedules."""
    seeds: int = 2
    """Runs of each."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    """Model, text, batch and first seed."""
    out: Path = Path("runs/speedup.jsonl")
    """Strict JSON lines, a run each."""

    def __post_init__(self) -> None:
        if len(set(self.horizons)) < 4 or min(self.horizons) < 1:
            raise ValueError(
                f"a curve with an offset needs four horizons or more, got {list(self.horizons)}."
            )
        check_repeats(seeds=self.seeds)
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}.")
        bad = [f for f in self.factors if not (math.isfinite(f) and f > 0)]
        if bad or not self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError(
                f"factors must be positive and named once each, got {list(self.factors)}."
            )
        check_used(self.run)
        line_up(f"{REFERENCE},{self.optimizers}")


Curve = tuple[float, float, float]


def fitted(steps: Sequence[float], losses: Sequence[float], near: Curve | None = None) -> Curve:
    """a, b, c of ``a + b steps**-c``, by least squares, with b and c positive and a not negative.

    Args:
      steps: numbers of steps.
      losses: of each.
      near: where to begin; by default three exponents are tried, and the best fit of the three is taken.

    Example:
      >>> from ravine.training.compare.speedup import fitted
      >>> [round(x, 3) for x in fitted([1, 4, 16, 64], [3.0, 2.0, 1.5, 1.25])]
      [1.0, 2.0, 0.5]
    """
    x, y = np.log(np.asarray(steps, float)), np.asarray(losses, float)

    def rest(p: np.ndarray) -> np.ndarray:
        return p[0] + np.exp(p[1] - p[2] * x) - y

    offset, low, high = 0.5 * float(y.min()), np.array([0, -50, 1e-3]), np.array([y.min(), 50, 5])
    if near is not None:
        starts = [np.clip([near[0], math.log(near[1]), near[2]], low, high)]
    else:
        starts = [[offset, math.log(y[0] - offset) + c * x[0], c] for c in (0.2, 0.5, 1.0)]
    fits: list[Any] = [least_squares(rest, start, bounds=(low, high)) for start in starts]
    a, b, c = min(fits, key=lambda fit: fit.cost).x
    return float(a), math.exp(float(b)), float(c)


def steps_for(loss: float, curve: Curve) -> float:
    """Where the curve has a loss; infinite at or below its offset."""
    a, b, c = curve
    return ((loss - a) / b) ** (-1 / c) if loss > a else math.inf


def worth(
    reference: Mapping[int, Sequence[float]],
    ends: Sequence[float],
    steps: int,
    *,
    samples: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How many times the steps the reference needs, and a 90 % interval by bootstrap over seeds.

    Args:
      reference: steps of whole schedules to the losses of every seed.
      ends: the rival's losses at the end of schedules of `steps`.
      steps: of the rival.
      samples: of the bootstrap.
      seed: of the draws.
    """

    def curve(pick: Any, near: Curve | None = None) -> Curve:
        means = [float(np.mean(pick(runs))) for runs in reference.values()]
        return fitted(list(reference), means, near)

    whole = curve(lambda runs: runs)
    middle = steps_for(float(np.mean(ends)), whole) / steps
    if len(ends) < 2:
        return middle, math.nan, math.nan
    rng = np.random.default_rng(seed)
    pick = lambda runs: rng.choice(runs, len(runs))
    drawn = [
        steps_for(float(np.mean(pick(ends))), curve(pick, whole)) / steps for _ in range(samples)
    ]
    low, high = np.quantile(drawn, [0.05, 0.95], method="nearest").tolist()
    return middle, low, high


def speedup(config: SpeedupConfig, console: Console) -> None:
    """Runs what is missing, and prints the table.

    Raises:
      ValueError: for a configuration, a text or a file of runs that cannot be used.
    """
    ends: dict[str, dict[int, list[float]]] = {}
    best: dict[int, float] = {}
    with kept_losses(config.run, config.out) as (corpus, kept):
        runs = Runs(config.run, corpus, kept, console)

        def losses(entrant: Entrant, steps: int, factor: float = 1.0) -> list[float]:
            tried = dataclasses.replace(entrant, learning_rate=factor * entrant.learning_rate)
            return [runs.loss(tried, repeat, steps) for repeat in range(config.seeds)]

        reference, *rivals = line_up(f"{REFERENCE},{config.optimizers}")
        for steps in config.horizons:
            tried = {factor: losses(reference, steps, factor) for factor in config.factors}
            best[steps] = min(tried, key=lambda factor, t=tried: float(np.mean(t[factor])))
            ends.setdefault(REFERENCE, {})[steps] = tried[best[steps]]
        for rival in rivals:
            ends[rival.name] = {config.length: losses(rival, config.length)}
    console.print(_table(config, ends, best))


def _table(
    config: SpeedupConfig, ends: Mapping[str, Mapping[int, list[float]]], best: Mapping[int, float]
) -> Table:
    reference = ends[REFERENCE]
    a, b, c = fitted(list(reference), [float(np.mean(runs)) for runs in reference.values()])
    rate = lambda steps: f" at x {best[steps]:g}" if len(config.factors) > 1 else ""
    fit = ", ".join(
        f"{steps}{rate(steps)}: {np.mean(runs):.3f} ({a + b * steps**-c:.3f})"
        for steps, runs in reference.items()
    )
    caption = f"{REFERENCE}, steps: loss (fit {a:.3g} + {b:.3g} D^-{c:.2g}): {fit}"
    table = Table(caption=caption, box=box.SIMPLE_HEAD)
    for heading in (
        "optimizer",
        f"loss after {config.length} steps",
        f"{REFERENCE}'s steps for it",
    ):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    table.add_column("worth", justify="right")
    for name, found in ends.items():
        if name == REFERENCE:
            continue
        losses = found[config.length]
        ratio, low, high = worth(reference, losses, config.length)
        between = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
        needed = f"{ratio * config.length:,.0f}"
        table.add_row(name, f"{np.mean(losses):.3f}", needed, f"{ratio:.2f} x the tokens{between}")
    return table
