"""The critical batch size: a fit to the steps that each batch size took, with its uncertainty."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

SPAN = 100.0
"""How far outside the tried batch sizes the critical one is searched for, as a factor."""


@dataclasses.dataclass(frozen=True)
class CriticalBatch:
    r"""Steps to a loss as a function of the batch size.

    .. math:: S(B) = S_{\min} (1 + B_{\mathrm{crit}} / B), \qquad
        E(B) = B \, S(B) = E_{\min} (1 + B / B_{\mathrm{crit}})

    Attributes:
      batch: :math:`B_{\mathrm{crit}}`, in the unit of the batch sizes.
      steps: :math:`S_{\min}`.
      low: the lower end of the interval of :math:`B_{\mathrm{crit}}`; NaN with one seed.
      high: the upper end.
    """

    batch: float
    steps: float
    low: float
    high: float

    def steps_at(self, batch: float) -> float:
        """Steps that a batch size takes."""
        return self.steps * (1 + self.batch / batch)

    def amount_at(self, batch: float) -> float:
        """Tokens, or examples, that a batch size takes."""
        return batch * self.steps_at(batch)

    def sentence(self, unit: str = "tokens") -> str:
        """The answer in a line.

        Example:
          >>> from ravine.training.batch_size.fit import CriticalBatch
          >>> print(CriticalBatch(24100.0, 80.0, 18000.0, 33000.0).sentence())
          B* = 24k tokens (18k to 33k): well below it, doubling the batch halves the steps
        """
        between = "" if math.isnan(self.low) else f" ({_short(self.low)} to {_short(self.high)})"
        return (
            f"B* = {_short(self.batch)} {unit}{between}: well below it, doubling the batch halves the "
            "steps"
        )


def fit_critical_batch(
    steps: Mapping[float, Sequence[float]],
    *,
    samples: int = 1000,
    interval: float = 0.9,
    seed: int = 0,
) -> CriticalBatch:
    r"""Fits :math:`S_{\min} (1 + B_{\mathrm{crit}} / B)` to steps, in logarithms, by least squares.

    The interval is a bootstrap over seeds: of every batch size, as many runs as there are, drawn with
    replacement.

    Args:
      steps: batch sizes to the steps that each seed took; infinite where the loss was not reached.
      samples: of the bootstrap.
      interval: its coverage.
      seed: of the draws.

    Raises:
      ValueError: with fewer than three batch sizes that reached the loss.

    Source: McCandlish et al., 2018, https://arxiv.org/abs/1812.06162, equation 2.11.

    Example:
      >>> from ravine.training.batch_size.fit import fit_critical_batch
      >>> found = fit_critical_batch({4: [500.0], 16: [200.0], 64: [125.0]})
      >>> round(found.batch, 2), round(found.steps, 2)
      (16.0, 100.0)
    """
    reached = {b: [s for s in runs if math.isfinite(s)] for b, runs in sorted(steps.items())}
    reached = {b: runs for b, runs in reached.items() if runs}
    if len(reached) < 3:
        raise ValueError(
            f"a critical batch size needs three batch sizes that reach the loss, got {len(reached)} "
            f"({', '.join(f'{b:g}' for b in reached) or 'none'}); give more steps, or other batch sizes."
        )
    batches = np.array(list(reached), np.float64)
    means = lambda runs: np.array([np.mean(np.log(r)) for r in runs])
    batch, fewest = _fit(batches, means(reached.values()))
    low = high = math.nan
    if min(map(len, reached.values())) > 1:
        rng = np.random.default_rng(seed)
        draws = [rng.choice(np.log(r), (samples, len(r))).mean(axis=1) for r in reached.values()]
        found = _grid(batches, np.stack(draws, axis=1))
        low, high = np.quantile(found, [(1 - interval) / 2, (1 + interval) / 2]).tolist()
    return CriticalBatch(batch, fewest, low, high)


def _ends(batches: np.ndarray) -> tuple[float, float]:
    return float(np.log(batches.min() / SPAN)), float(np.log(batches.max() * SPAN))


def _fit(batches: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    rest = lambda log_batch: logs - np.log1p(np.exp(log_batch) / batches)
    loss = lambda log_batch: float(np.var(rest(log_batch)))
    found: Any = minimize_scalar(loss, bounds=_ends(batches), method="bounded")
    return math.exp(found.x), math.exp(float(np.mean(rest(found.x))))


def _grid(batches: np.ndarray, logs_SxB: np.ndarray) -> np.ndarray:
    """The same for many samples, to 1 %: what the ends of an interval need."""
    low, high = _ends(batches)
    tried = np.arange(low, high, 0.01)
    shape_GxB = np.log1p(np.exp(tried)[:, None] / batches[None])
    # The variance of a difference, without an array of samples by grid by batch sizes.
    centred = shape_GxB - shape_GxB.mean(axis=1, keepdims=True)
    losses_SxG = np.sum(centred**2, axis=1)[None] - 2 * logs_SxB @ centred.T
    return np.exp(tried[np.argmin(losses_SxG, axis=1)])


def _short(amount: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return (
                f"{amount / size:.2g}{letter}"
                if amount < 10 * size
                else f"{amount / size:.0f}{letter}"
            )
    return f"{amount:.3g}"
