"""Pictures of the studies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LINES = {
    "with decay": ("#0072b2", "-"),
    "without": ("#d55e00", "-"),
    "without, rate matched": ("#009e73", "--"),
    "with decay, bfloat16": ("#56b4e9", ":"),
    "without, bfloat16": ("#cc79a7", ":"),
}


def draw_decay(file: Path, runs: Mapping[str, Any]) -> None:
    """Training losses, averaged over a twentieth of the run, and the norm of matrices.

    Args:
      file: where to; the ending decides the format.
      runs: of :func:`.decay.study_decay`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in runs.items():
        colour, style = LINES[name]
        window = max(1, len(run.losses) // 20)
        mean = np.convolve(run.losses, np.ones(window) / window, "valid")
        at = np.arange(len(mean)) + window
        left.plot(at, mean, style, color=colour, label=f"{name}: held out {run.heldout:.3f}")
        right.plot(run.norms, style, color=colour)
    left.set(xlabel="updates", ylabel="training loss, nats", yscale="log")
    right.set(xlabel="updates", ylabel="norm of all matrices")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25, which="both", lw=0.5)
    figure.savefig(file, dpi=130)
