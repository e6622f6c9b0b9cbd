"""The best learning rate: which ones are tried, and a parabola through them with its uncertainty."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..compare.runs import Late

NEAR = 2.0
"""Rates within this factor of the best one tried belong to the parabola: five, root 2 apart."""
REACH = 6
"""Doublings that a search goes up or down at most."""


def search(
    measure: Callable[[float], list[float]], found: dict[float, list[float]], start: float
) -> None:
    """Factors of 2 from the start until worse ones are on both sides, then root 2 beside the best.

    Args:
      measure: from a factor to the losses of the seeds.
      found: where they go.
      start: the first factor, a power of root 2.
    """

    def mean(half: int) -> float:
        factor = 2 ** (half / 2)
        if factor not in found:
            found[factor] = measure(factor)
        return float(np.mean(found[factor]))

    best = round(2 * math.log2(start))
    with contextlib.suppress(Late):
        mean(best)
        for step in (2, -2):
            for _ in range(REACH):
                if not mean(best + step) < mean(best):
                    break
                best += step
        for step in (1, -1):
            if mean(best + step) < mean(best):
                best += step
                break
        for half in (best - 2, best - 1, best + 1, best + 2):
            mean(half)


class Optimum(NamedTuple):
    """Where the loss is least."""

    log2: float
    """Of the rate."""
    error: float
    """Standard error of it, infinite where it cannot be told."""
    free: int
    """Degrees of freedom of that error."""
    loss: float
    """There, by the parabola."""
    inside: bool
    """Whether worse rates were tried on both sides; if not, the best one is an end of the search."""
    lowest: bool = False
    """Whether it is the lower end."""


def optimum(losses: Mapping[float, Sequence[float]]) -> Optimum:
    r"""The vertex of a parabola in the logarithm of the rate, by least squares.

    The parabola takes the means over seeds. How far they scatter around it, with as many degrees of
    freedom as there are rates more than three, gives the standard error of the vertex; and with several
    seeds, each with its own parabola, so does the scatter of their vertices. The larger one counts.

    Args:
      losses: of each rate, one per seed, infinite where a run diverged.

    Example:
      >>> from ravine.training.studies.optimum import optimum
      >>> losses = {2.0**k: [1 + 0.1 * (k - 0.25) ** 2] for k in (-1, -0.5, 0, 0.5, 1)}
      >>> round(optimum(losses).log2, 3)
      0.25
    """
    means = {rate: float(np.mean(each)) for rate, each in sorted(losses.items())}
    best = min(means, key=means.__getitem__)
    inside = min(means) < best < max(means)
    near = [
        rate
        for rate, mean in means.items()
        if math.isfinite(mean) and 1 / NEAR <= rate / best * (1 + 1e-9) <= NEAR * (1 + 2e-9)
    ]
    end = Optimum(math.log2(best), math.inf, 0, means[best], inside, best == min(means))
    if not inside or len(near) < 3:
        return end._replace(inside=False)
    logs = np.log2(near)
    found = _vertex(logs, np.array([means[rate] for rate in near]))
    if found is None:
        return end
    at, error, loss = found
    free = len(near) - 3
    seeds = min(len(losses[rate]) for rate in near)
    each = [_vertex(logs, np.array([losses[rate][seed] for rate in near])) for seed in range(seeds)]
    own = [vertex[0] for vertex in each if vertex is not None]
    if len(own) > 1:
        scatter = float(np.std(own, ddof=1)) / math.sqrt(len(own))
        if math.isinf(error) or scatter > error:
            error, free = scatter, len(own) - 1
    return Optimum(at, error, free, loss, inside)


def _vertex(logs: np.ndarray, values: np.ndarray) -> tuple[float, float, float] | None:
    """Its place, its standard error and its height; nothing where the parabola opens downwards."""
    middle = float(np.mean(logs))
    design = np.stack([np.square(logs - middle), logs - middle, np.ones_like(logs)], axis=1)
    (a, b, c), *_ = np.linalg.lstsq(design, values, rcond=None)
    if a <= 0:
        return None
    at = -b / (2 * a)
    free = len(logs) - 3
    error = math.inf
    if free:
        variance = float(np.sum(np.square(design @ np.array([a, b, c]) - values))) / free
        slope = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
        error = math.sqrt(variance * float(slope @ np.linalg.inv(design.T @ design) @ slope))
    return middle + float(at), error, float(c - b * b / (4 * a))
