"""What `python -m ravine study width` is asked."""

import dataclasses
import math
from pathlib import Path

from ...optimizers.links.growth import Rank
from ...optimizers.width import width_rule
from ..compare.trial import check_used
from ..config import RunConfig, check_repeats
from ..identity import LATER
from ..width.coordinates import at_width
from .width_lines import Line, lines_of


@dataclasses.dataclass(frozen=True)
class WidthStudyConfig:
    """Shows how far the best learning rate moves with the width, by the rules and without them.

    Trains the model at every width and at learning rates around the best, prints where it is, and by
    what factor it moves from the first width to the last. Every run is a line of runs.jsonl; a study
    that was stopped goes on with what is missing. Takes an hour or more at the defaults.
    """

    optimizers: str = "adamw,muon,soap,shampoo"
    """Names, separated by commas; tuned ones."""
    fallback_rates: str = dataclasses.field(default="", metadata=LATER)
    """name=value, separated by commas: also sweep the rate of that optimizer's matrices alone, and keep
    its fallback's peak rate (AdamW's, for embeddings, head and norms) at the value, times its factor
    for width."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Two or more, rising; the first is the base model's."""
    length: int = 200
    """Updates of every run, a whole schedule."""
    seeds: int = 1
    """Runs of each learning rate."""
    control: bool = True
    """Also with one learning rate for all parameters at all widths."""
    rank: Rank | None = None
    """Which limit the rules take for whitened directions; by default each optimizer's own."""
    minutes: float = 0.0
    """Begin no run after so many minutes, and report what is there; 0 for no bound."""
    run: RunConfig = dataclasses.field(
        default_factory=lambda: RunConfig(seed=2000, eval_batches=32)
    )
    """Model, text, batch and first seed."""
    out: Path = Path("runs/study-width")
    """Folder for runs.jsonl, width.json and width.png."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must be two or more that rise, got {list(self.widths)}.")
        check_repeats(seeds=self.seeds)
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}.")
        if not (math.isfinite(self.minutes) and self.minutes >= 0):
            raise ValueError(f"minutes must be finite and not negative, got {self.minutes}.")
        check_used(self.run)
        base = at_width(self.run.model, self.widths[0])
        for width in self.widths:
            at_width(base, width)
        for line in self.lines():
            width_rule(line.entrant.optimizer, rank=self.rank)

    def lines(self) -> tuple[Line, ...]:
        """What is swept, a row of the table each."""
        return lines_of(self.optimizers, self.fallback_rates)
