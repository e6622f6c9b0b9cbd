"""The picture of published shapes: layers against width, and both ratios against the size."""

from collections.abc import Mapping
from pathlib import Path

from ..colours import PALETTE
from ..run.files import save_figure
from .shape import ModelShape

FAMILIES = ("gpt", "t5", "llama", "palm", "gemma", "qwen")
"""Those with a colour of their own; the others are black."""


def draw(file: Path, shapes: Mapping[str, ModelShape]) -> None:
    """Three panels: layers against width, d_ff / d and heads x head width / d against parameters.

    Args:
      file: where to; the ending decides the format.
      shapes: by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for index, family in enumerate((*FAMILIES, "other")):
        mine = [shape for name, shape in shapes.items() if _family(name) == family]
        if not mine:
            continue
        style = {"color": PALETTE[index], "s": 18, "alpha": 0.8}
        left.scatter([s.width for s in mine], [s.layers for s in mine], label=family, **style)
        counts = [s.count for s in mine]
        middle.scatter(counts, [s.feed_forward_ratio for s in mine], **style)
        right.scatter(counts, [s.head_ratio for s in mine], **style)
    widths = sorted({s.width for s in shapes.values()})
    ends = [widths[0], widths[-1]]
    for aspect, line in ((50, ":"), (128, "-"), (200, ":")):
        left.plot(ends, [width / aspect for width in ends], line, color="grey", lw=0.8)
        left.annotate(f"d / L = {aspect}", (ends[1], ends[1] / aspect), fontsize=7, ha="right")
    for ratio, line in ((4, "-"), (8 / 3, ":")):
        middle.axhline(ratio, color="grey", ls=line, lw=0.8)
    right.axhline(1, color="grey", lw=0.8)
    left.set(xlabel="width d", ylabel="layers L", xscale="log", yscale="log")
    middle.set(
        xlabel="parameters", ylabel="d_ff / d (lines: 4 and 8/3)", xscale="log", yscale="log"
    )
    right.set(xlabel="parameters", ylabel="heads x head width / d", xscale="log", yscale="log")
    left.legend(frameon=False, fontsize=7)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25, which="major", lw=0.5)
    save_figure(figure, file, 130)


def _family(name: str) -> str:
    return next((family for family in FAMILIES if name.startswith(family)), "other")
