"""The best of a few learning rates, between those that were tried: a parabola, and its uncertainty."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

NEAR = 2.0
"""Rates within this factor of the best one tried belong to the parabola: five, root 2 apart."""


class Optimum(NamedTuple):
    """Where the loss is least."""

    log2: float
    """Of the rate."""
    error: float
    """Standard error of it, infinite where it cannot be told."""
    loss: float
    """There, by the parabola."""
    inside: bool
    """Whether worse rates were tried on both sides; if not, the best one is an end of the search."""


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
    end = Optimum(math.log2(best), math.inf, means[best], inside)
    if not inside or len(near) < 3:
        return end._replace(inside=False)
    logs = np.log2(near)
    found = _vertex(logs, np.array([means[rate] for rate in near]))
    if found is None:
        return end
    at, error, loss = found
    seeds = min(len(losses[rate]) for rate in near)
    each = [_vertex(logs, np.array([losses[rate][seed] for rate in near])) for seed in range(seeds)]
    own = [vertex[0] for vertex in each if vertex is not None]
    if len(own) > 1:
        scatter = float(np.std(own, ddof=1)) / math.sqrt(len(own))
        error = scatter if math.isinf(error) else max(error, scatter)
    return Optimum(at, error, loss, inside)


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
