"""The picture of a coordinate check."""

from collections.abc import Mapping
from pathlib import Path

from ..colours import PALETTE
from ..run.files import save_figure


def draw(
    file: Path,
    found: Mapping[str, Mapping[bool, Mapping[str, Mapping[int, float]]]],
    what: str = "width",
) -> None:
    """The change of every activation against the width; above without the rule, below with it.

    Args:
      file: where to; the ending decides the format.
      found: by optimizer, by whether the rule is used, by activation, by width or number of layers.
      what: the label of that axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(found) + 1.6, 5.4), layout="constrained")
    panels = figure.subplots(2, len(found), sharex=True, sharey="col", squeeze=False)
    for column, (name, both) in enumerate(found.items()):
        for with_rule, sizes in both.items():
            axes = panels[int(with_rule)][column]
            for index, (activation, by_width) in enumerate(sizes.items()):
                axes.plot(
                    list(by_width),
                    list(by_width.values()),
                    marker="o",
                    ms=3,
                    lw=1.3,
                    color=PALETTE[index % len(PALETTE)],
                    label=activation,
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.25, which="both", lw=0.5)
            widths = list(next(iter(sizes.values())))
            axes.set_xticks(widths, [str(width) for width in widths])
            if not with_rule:
                axes.set_title(name)
            else:
                axes.set_xlabel(what)
    panels[0][0].set_ylabel("one rate for all\nRMS of change")
    panels[1][0].set_ylabel("by the rule\nRMS of change")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, file, 130)
