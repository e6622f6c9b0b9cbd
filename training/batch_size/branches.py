"""Branches: the same loss reached at several batch sizes, each at its best learning rate."""

import math
from collections.abc import Callable, Sequence

import numpy as np


def steps_to(target: float, steps: Sequence[float], losses: Sequence[float]) -> float:
    """The step at which a curve first reaches a loss, interpolated; infinite if it does not.

    Args:
      target: the loss.
      steps: of the evaluations, rising.
      losses: at these steps.

    Example:
      >>> from ravine.training.batch_size.branches import steps_to
      >>> steps_to(2.5, [0, 10, 20], [4.0, 3.0, 2.0])
      15.0
    """
    before: tuple[float, float] | None = None
    for step, loss in zip(steps, losses, strict=True):
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            last, worse = before
            return float(last + (step - last) * (worse - target) / (worse - loss))
        before = (step, loss)
    return math.inf


def best_steps(
    run: Callable[[int, float, int], float],
    batches: Sequence[int],
    factors: Sequence[float],
    seeds: Sequence[int],
) -> tuple[dict[float, list[float]], dict[float, float]]:
    """For each batch size, the steps of every seed at the learning rate that is best over all seeds.

    Args:
      run: from batch size, factor of the learning rate and seed to steps, infinite where the loss was
        not reached.
      batches: batch sizes.
      factors: of the learning rate, beside what the rule for the batch size makes of it.
      seeds: of the branches.

    Returns:
      Batch sizes to steps, a number for each seed; and batch sizes to the best factor.

    Raises:
      ValueError: with fewer than three batch sizes, repeated ones, or no factors or seeds.

    Example:
      >>> from ravine.training.batch_size.branches import best_steps
      >>> best_steps(lambda batch, factor, seed: 100 / batch + factor, [1, 2, 4], [1.0, 2.0], [0])
      ({1: [101.0], 2: [51.0], 4: [26.0]}, {1: 1.0, 2: 1.0, 4: 1.0})
    """
    check_branches(batches, factors, seeds)
    steps: dict[float, list[float]] = {}
    chosen: dict[float, float] = {}
    for batch in batches:
        tried = {factor: [run(batch, factor, seed) for seed in seeds] for factor in factors}
        chosen[batch] = min(factors, key=lambda factor: np.mean(np.log(tried[factor])))
        steps[batch] = tried[chosen[batch]]
    return steps, chosen


def check_branches(batches: Sequence[int], factors: Sequence[float], seeds: Sequence[int]) -> None:
    """Refuses batch sizes, factors and seeds that no critical batch size can be fitted to."""
    wrong = []
    if len(set(batches)) < 3 or len(set(batches)) < len(batches) or min(batches) < 1:
        wrong.append(f"three or more different batch sizes of at least 1, got {list(batches)}")
    if not factors or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        wrong.append(f"positive factors of the learning rate, got {list(factors)}")
    if not seeds or len(set(seeds)) < len(seeds):
        wrong.append(f"one or more different seeds, got {list(seeds)}")
    if wrong:
        raise ValueError(f"branches need {' and '.join(wrong)}.")
