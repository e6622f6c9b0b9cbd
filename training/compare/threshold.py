r"""When several runs together are below a target loss: the rule of modded-nanogpt's optimizer track.

Runs of one optimizer that differ by chance only have held-out losses of standard deviation
:math:`\sigma` around a mean. That the mean is below the target :math:`\tau` is taken as shown if

.. math:: (\tau - \bar\ell) \sqrt n \ge m

with a margin :math:`m = 0.004`: a one-sided z-test for :math:`\sigma = 0.0013` at p = 0.001. The step is
the same for all runs; a run may not stop where its own loss is good. Source:
KellerJordan/modded-nanogpt at f411b3d3, ``records/track_3_optimization/README.md``, rules 3 and 5.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ..run.outcome import Outcome

MARGIN = 0.004


class Verdict(NamedTuple):
    """What several runs of an optimizer say about a target."""

    reached: bool
    step: int
    """The first evaluated step at which the rule holds, or the last one if it never does."""
    mean: float
    """Of the held-out losses there."""
    runs: int
    evidence: float
    """(target - mean) times the root of the number of runs."""


def is_below(losses: Sequence[float], target: float, margin: float = MARGIN) -> bool:
    """Whether the mean of these losses is below the target by the rule.

    Args:
      losses: of all runs that were made, at one step.
      target: the loss to reach.
      margin: what (target - mean) times the root of their number must be at least.

    Example:
      >>> from ravine.training.compare.threshold import is_below
      >>> is_below([3.27903], 3.28)  # one run needs 3.276
      False
      >>> is_below([3.27717, 3.27792, 3.27503, 3.28025], 3.28)  # a mean of 3.2776, four runs
      True
    """
    return evidence(losses, target) >= margin


def evidence(losses: Sequence[float], target: float) -> float:
    """(target - mean) times the root of the number of runs."""
    return (target - statistics.fmean(losses)) * math.sqrt(len(losses))


def verdict(
    runs: Sequence[Sequence[dict[str, float]]], target: float, margin: float = MARGIN
) -> Verdict | None:
    """The first step at which the runs are below the target together.

    Args:
      runs: for each, its evaluations with ``step`` and ``heldout_loss``.
      target: the loss to reach.
      margin: see `is_below`.

    Returns:
      None if there is no step at which every run was evaluated.

    Example:
      >>> from ravine.training.compare.threshold import verdict
      >>> each = lambda *losses: [{"step": 25 * i, "heldout_loss": x} for i, x in enumerate(losses)]
      >>> found = verdict([each(3.5, 3.279, 3.277), each(3.5, 3.28, 3.277)], 3.28)
      >>> found.reached, found.step, found.runs, round(found.evidence, 4)
      (True, 50, 2, 0.0042)
    """
    losses = [{int(e["step"]): e["heldout_loss"] for e in evaluations} for evaluations in runs]
    steps = sorted(set.intersection(*map(set, losses))) if losses else []
    for step in steps:
        here = [of_run[step] for of_run in losses]
        if is_below(here, target, margin) or step == steps[-1]:
            found = evidence(here, target)
            return Verdict(found >= margin, step, statistics.fmean(here), len(here), found)
    return None


def in_words(outcomes: Sequence[Outcome], target: float) -> list[str]:
    """A line for each optimizer; one of which a run diverged has not reached the target."""
    lines = []
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.name == name]
        found = verdict([outcome.evaluations for outcome in mine], target)
        if found is None or any(outcome.status == "diverged" for outcome in mine):
            lines.append(f"{name}: {target:g} not reached by all of {len(mine)} run(s)")
            continue
        word = "reached" if found.reached else "not reached"
        lines.append(
            f"{name}: {target:g} {word} at step {found.step:,}: mean {found.mean:.4f} of {found.runs} "
            f"run(s), evidence {found.evidence:.4f}, {MARGIN:g} needed"
        )
    return lines
