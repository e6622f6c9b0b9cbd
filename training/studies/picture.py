"""Pictures of the studies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..colours import PALETTE
from ..run.files import save_figure

LINES = {
    "with decay": (PALETTE[0], "-"),
    "without": (PALETTE[1], "-"),
    "without, rate matched": (PALETTE[2], "--"),
    "with decay, bfloat16": (PALETTE[5], ":"),
    "without, bfloat16": (PALETTE[3], ":"),
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
    save_figure(figure, file, 130)


def draw_width(
    file: Path,
    rates: Mapping[str, float],
    found: Mapping[Any, Mapping[float, Any]],
    best: Mapping[Any, Any],
) -> None:
    """Losses against learning rates at every width, and where the best is; a row per kind of rates.

    Args:
      file: where to; the ending decides the format.
      rates: of each optimizer, the tuned one.
      found: losses by (optimizer, rule, width) and factor, of :func:`.width.study_width`.
      best: by the same.
    """
    from matplotlib.figure import Figure

    kinds = sorted({ruled for _, ruled, _ in found}, reverse=True)
    widths = sorted({width for _, _, width in found})
    figure = Figure(figsize=(2.5 * len(rates) + 1.2, 2.7 * len(kinds) + 0.4), layout="constrained")
    panels = figure.subplots(len(kinds), len(rates), squeeze=False, sharex="col", sharey="col")
    for (name, ruled, width), losses in found.items():
        axes = panels[kinds.index(ruled)][list(rates).index(name)]
        colour = PALETTE[widths.index(width) % len(PALETTE)]
        means = {rates[name] * f: float(np.mean(losses[f])) for f in sorted(losses)}
        means = {rate: loss for rate, loss in means.items() if np.isfinite(loss)}
        axes.plot(
            list(means),
            list(means.values()),
            "o-",
            ms=3,
            lw=1.2,
            color=colour,
            label=f"{width} wide",
        )
        if means and best[name, ruled, width].inside:
            at = best[name, ruled, width]
            spread = at.error if np.isfinite(at.error) else 0.0
            ends = [rates[name] * 2 ** (at.log2 + side * spread) for side in (-1, 1)]
            axes.plot(ends, [at.loss] * 2, "-", lw=3, alpha=0.4, color=colour)
            axes.plot(rates[name] * 2**at.log2, at.loss, "*", ms=9, color=colour)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25, which="both", lw=0.5)
    for column, name in enumerate(rates):
        panels[0][column].set_title(name)
        panels[-1][column].set_xlabel("peak learning rate")
        panels[-1][column].xaxis.set_major_formatter(lambda x, _: f"{x:.2g}")
        panels[-1][column].tick_params(axis="x", labelsize=7)
    for row, ruled in enumerate(kinds):
        what = "by the rule for width" if ruled else "one rate for all"
        panels[row][0].set_ylabel(f"{what}\nheld-out loss, nats")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, file, 130)
