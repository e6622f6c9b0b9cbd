"""The picture of a critical batch size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..colours import PALETTE
from ..run.files import save_figure
from .fit import CriticalBatch

BLUE, RED, GREEN, *_ = PALETTE


def draw(
    file: Path, steps: Mapping[float, Sequence[float]], found: CriticalBatch, noise: float
) -> None:
    """Steps against the batch size, and against tokens, with the fit and its interval.

    Args:
      file: where to; the ending decides the format.
      steps: batch sizes in tokens to the steps of every seed.
      found: the fit.
      noise: the gradient noise scale, in tokens.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = np.geomspace(min(steps) / 2, max(*steps, found.batch) * 1.5, 200)
    fitted = np.array([found.steps_at(batch) for batch in batches])
    left.plot(batches, fitted, color=BLUE, label=r"$S_{min}(1 + B_{crit} / B)$")
    right.plot(batches * fitted, fitted, color=BLUE)
    for index, (batch, runs) in enumerate(steps.items()):
        label = "branches, one per seed" if not index else None
        left.plot([batch] * len(runs), runs, "o", color=RED, label=label, alpha=0.8)
        right.plot(batch * np.array(runs), runs, "o", color=RED, alpha=0.8)
    left.axvline(found.batch, color=GREEN, label=rf"$B_{{crit}}$ = {found.batch:,.0f} tokens")
    if np.isfinite(found.low):
        left.axvspan(found.low, found.high, color=GREEN, alpha=0.15, label="90 % interval")
    if np.isfinite(noise) and noise > 0:
        left.axvline(noise, color="#666666", ls="--", label=f"noise scale = {noise:,.0f} tokens")
    left.set(xscale="log", yscale="log", xlabel="batch size, tokens", ylabel="steps to the loss")
    right.set(yscale="log", xlabel="tokens to the loss, thousands", ylabel="steps to the loss")
    right.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}")
    left.set_title("Steps against batch size")
    right.set_title("Steps against tokens")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both", lw=0.5)
    save_figure(figure, file, 150)
