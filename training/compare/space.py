"""The space that a sweep searches: the same kind for every optimizer, and quasi-random points in it."""

import dataclasses
import math
from typing import Any

from scipy.stats import qmc

from ...optimizers.registry import OptimizerConfig

RATES = {
    "sgd": 0.3,
    "nesterov": 0.3,
    "adagrad": 0.03,
    "lion": 1e-3,
    "cautious_lion": 1e-3,
    "sophia_g": 1e-3,
    "sophia_h": 1e-3,
    "schedule_free_sgd": 3.0,  # 10 to 50 times SGD's, its authors say: it has no momentum to add up
    "adan": 0.02,  # 5 to 10 times AdamW's, its authors say
    "muon": 0.02,
    "normuon": 0.02,
    "adamuon": 0.02,
    "soap_muon": 0.02,
    "kl_shampoo": 0.02,
}
"""Middles of the learning rates searched, where they are not `MIDDLE`: the order of magnitude that each
algorithm's update size requires."""
MIDDLE = 5e-3
SPAN = 16.0
"""Learning rates lie within this factor of the middle, either way: a factor of 256 from end to end."""

FIRST, SECOND = ("b1", "momentum"), ("b2",)
SQUARES = {"adan": ("b3",)}
"""Names of the second decay rate, that of squares, where `SECOND` means something else."""
CHOICES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "shampoo": ("roots", (None, {"exponent": -0.5})),
    "muon": ("scale", ("moonlight", "keller")),
    "normuon": ("scale", ("moonlight", "keller")),
    "adan": ("b2", (0.92, 0.8)),
    "ademamix": ("b3", (0.99, 0.999, 0.9999)),
    "mars": ("gamma", (0.025, 0.1)),
    "sophia_g": ("rho", (0.01, 0.04, 0.16)),
    "sophia_h": ("rho", (0.01, 0.04, 0.16)),
}
"""At most one parameter of an algorithm's own, and the values tried in turn."""

FIXED: dict[str, dict[str, Any]] = {
    name: {"refresh": {"every": 5}} for name in ("shampoo", "kl_shampoo", "soap", "soap_muon")
} | {
    # The paper's for language models; its warm-ups last as long as the run, here the longest trial.
    "ademamix": {"alpha": 5.0, "alpha_warmup": 700, "b3_warmup": 700}
}
"""Hyperparameters that are not searched and differ from the defaults, the same for like algorithms."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One trial's hyperparameters."""

    learning_rate: float
    """The peak."""
    weight_decay: float
    """Share of every matrix that a step at the peak removes."""
    warmup: float
    """Share of the steps."""
    optimizer: OptimizerConfig
    """Decay rates, and the one parameter of its own."""


def points(name: str, trials: int, seed: int) -> list[Point]:
    r"""So many quasi-random points: a scrambled Sobol sequence, the same for the same seed.

    ==================  ==============================  ===========
    dimension           from, to                        scale
    ==================  ==============================  ===========
    learning rate       middle / 16, middle * 16        logarithmic
    weight decay        3e-5, 3e-3 (share per step)     logarithmic
    warm-up             0.01, 0.1 (share of the steps)  linear
    1 - first decay     0.02, 0.3                       logarithmic
    1 - second decay    0.003, 0.3                      logarithmic
    its own             `CHOICES`                       in turn
    ==================  ==============================  ===========

    Args:
      name: a registered optimizer; dimensions it lacks are left out.
      trials: how many; powers of two fill the space most evenly.
      seed: of the scrambling.

    Example:
      >>> from ravine.training.compare.space import points
      >>> [round(point.learning_rate, 4) for point in points("adamw", 4, seed=0)]
      [0.003, 0.0509, 0.0095, 0.0006]
    """
    plain = OptimizerConfig(name, FIXED.get(name, {}))
    middle, second = RATES.get(name, MIDDLE), SQUARES.get(name, SECOND)
    sampler = qmc.Sobol(d=6, scramble=True, rng=seed)
    found = []
    for unit in sampler.random_base2(max(0, math.ceil(math.log2(trials))))[:trials].tolist():
        values = dict(plain.hyperparameters)
        for names, part, low, high in ((FIRST, unit[3], 0.02, 0.3), (second, unit[4], 0.003, 0.3)):
            beta = next((n for n in names if plain.accepts(n)), None)
            if beta is not None:
                values[beta] = _round(1 - _log(part, low, high), 4)
        own, choices = CHOICES.get(name, ("", ()))
        if choices:
            choice = choices[min(int(unit[5] * len(choices)), len(choices) - 1)]
            if choice is not None:
                values[own] = choice
        found.append(
            Point(
                learning_rate=_round(_log(unit[0], middle / SPAN, middle * SPAN)),
                weight_decay=_round(_log(unit[1], 3e-5, 3e-3)),
                warmup=_round(0.01 + 0.09 * unit[2]),
                optimizer=OptimizerConfig(name, values),
            )
        )
    return found


def _log(part: float, low: float, high: float) -> float:
    return low * (high / low) ** part


def _round(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")
