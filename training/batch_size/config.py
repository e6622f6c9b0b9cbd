"""What `python -m ravine batch-size` is asked."""

import dataclasses
import math
from pathlib import Path

from ..config import check_repeats
from ..model_config import ModelConfig
from .branches import check_branches

MICRO_BATCHES = 4
"""A batch is cut into so many where the noise scale is measured."""


@dataclasses.dataclass(frozen=True)
class BatchSizeConfig:
    """Measures the critical batch size of a model at one point of its training.

    One run trains at the base batch size. From its state, branches train at each batch size, with the
    learning rate, decay rates, epsilon and weight decay that the rules for this batch size give, times
    each rate factor, until they reach the loss that the run itself reaches some updates later. The
    steps they take are fitted by S_min (1 + B_crit / B).
    """

    optimizer: str = "adamw"
    """A registered optimizer."""
    learning_rate: float = 0.0
    """Peak of the run at the base batch size; 0 takes the tuned one."""
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Sequences per step of the branches; three or more."""
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors of the rescaled learning rate; for each batch size the best one counts."""
    seeds: int = 2
    """Branches per batch size and factor, each with data of its own."""
    batch_size: int = 16
    """Base: sequences per step of the run the branches leave."""
    start_steps: int = 100
    """Updates of the run before the branches leave it; the first tenth warms up."""
    target_steps: int = 100
    """Updates after which the run itself has reached the loss the branches are to reach."""
    most: float = 3.0
    """A branch gives up after this many times the steps that the same tokens, or the same steps, would
    take, whichever is more."""
    evaluations: int = 20
    """Evaluations over the steps that the same tokens would take."""
    eval_batches: int = 8
    """Held-out batches of the base size."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 switches clipping off."""
    weight_decay: float = 3e-4
    """Share of every matrix that a step of the base size removes."""
    seed: int = 0
    """Of the initial parameters and of the data of the run."""
    data: tuple[Path, ...] = ()
    """Text files or a uint16 .bin; by default this Python's own standard library."""
    out: Path = Path("runs/batch-size")
    """Folder for branches.jsonl, answer.json and batch_size.png; branches that are there are kept."""
    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(width=64, layers=2, unroll=2)
    )

    def __post_init__(self) -> None:
        check_repeats(seeds=self.seeds)
        check_branches(self.batch_sizes, self.rate_factors, range(self.seeds))
        for name in ("batch_size", "start_steps", "target_steps", "evaluations", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("clip_norm", "weight_decay", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if not (math.isfinite(self.most) and self.most >= 1):
            raise ValueError(f"most must be finite and at least 1, got {self.most}.")
        if self.batch_size % MICRO_BATCHES:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of {MICRO_BATCHES}, the micro-batches "
                "that the noise scale is measured from."
            )
