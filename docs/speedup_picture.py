"""Draws docs/speedup.svg from the table in docs/results.md: `python docs/speedup_picture.py`."""

import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ravine.training.colours import colour

HERE = Path(__file__).parent
ROW = re.compile(
    r"^\| `(\w+)` \|.*\| ([\d.]+) x the tokens \(([\d.]+) to ([\d.]+)\) \|$", re.MULTILINE
)


def rows() -> list[tuple[str, float, float, float]]:
    """Optimizer, what its schedule is worth, and the ends of the 90 % interval; best first."""
    found = [
        (name, *map(float, numbers))
        for name, *numbers in ROW.findall((HERE / "results.md").read_text())
    ]
    return sorted([*found, ("adamw", 1.0, 1.0, 1.0)], key=lambda row: -row[1])


def draw() -> Figure:
    """Bars from the best to the worst, with intervals, and AdamW as the line at 1."""
    names, worth, low, high = zip(*rows(), strict=True)
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots()
    error = np.abs(np.array([low, high]) - worth)
    axes.barh(
        names,
        worth,
        xerr=error,
        color=[colour(name) for name in names],
        height=0.66,
        ecolor="#444444",
    )
    for name, w, b in zip(names, worth, high, strict=True):
        axes.text(b + 0.03, name, f"{w:.2f} ×", va="center")
    axes.axvline(1.0, color="#444444", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 2.1), xlabel="AdamW's tokens for the same loss, as a multiple (90 % interval)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "ravine", "svg.fonttype": "path"})
    draw().savefig(HERE / "speedup.svg", metadata={"Date": None}, facecolor="white")
