"""Draws docs/schedules.svg, every shape and some operators: `python docs/schedules_gallery.py`."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ravine import schedules as s

STEPS, COLUMNS = 200, 6
COUNTS = np.arange(STEPS + 1)


def panels() -> dict[str, s.Schedule]:
    """What is drawn, by title."""
    shown = {name: s.for_run(name, 1.0, STEPS) for name in s.schedule_names()}
    shown["power_law"] = s.power_law(1.0, 1, 1, exponent=-0.8, scale=20.0)
    shown["inverse_sqrt"] = s.inverse_sqrt(1.0, 20)
    shown["t5"] = s.t5(1.0, 30)
    shown["noam"] = s.noam(1.0, 30)
    shown["sgdr"] = s.sgdr(1.0, STEPS, first_period=29, peak_factor=0.8)
    shown["sgdr, equal periods"] = s.sgdr(
        1.0, STEPS, first_period=50, period_factor=1, peak_factor=0.7
    )
    shown["cosine, squared"] = s.cosine(1.0, STEPS, exponent=2.0)
    for mode in ("triangular2", "exp_range"):
        shown[f"cyclic, {mode}"] = s.cyclic(1.0, 25, mode=mode, factor=0.99)
    shown["one_cycle, linear"] = s.one_cycle(1.0, STEPS, shape="linear")
    for kind in ("linear", "cosine"):
        points = [50, 100, STEPS], [0.3, 0.6, 0.0]
        shown[f"piecewise, {kind}"] = s.piecewise(1.0, *points, interpolate=kind)
    for shape in (
        "1-sqrt",
        "linear",
        "cosine",
        "square",
        "mirror-cosine",
        "inverse",
        "exponential",
    ):
        end = 0.05 if shape in ("inverse", "exponential") else 0.0
        shown[f"wsd, {shape}"] = s.wsd(
            1.0, STEPS, end, decay_steps=80, shape=shape, warmup_steps=20
        )
    for shape in ("linear", "cosine", "1-sqrt", "exponential"):
        body = s.cosine(1.0, 140)
        shown[f"warmup, {shape}"] = s.warmup(body, 60, shape=shape, start_ratio=0.01)
    shown["join"] = s.join([s.linear(1.0, 80, 0.5), s.cosine(0.8, 120)], [80])
    shown["product"] = s.product(
        s.ramp(0.0, 1.0, 30),
        s.inverse_sqrt(1.0, 50),
        s.join([s.constant(1.0), s.linear(1.0, 40)], [160]),
    )
    shown["anneal_from"] = s.anneal_from(s.cosine(1.0, STEPS), 80, 40)
    shown["rewarm"] = s.rewarm(s.cosine(1.0, 100), 100, 20, s.cosine(0.7, 80))
    shown["repeat"] = s.repeat(s.linear(1.0, 50), 50, 4)
    batch = s.BatchSizes((8, 16, 32), (50, 100))
    shown["follow_data"] = s.follow_data(s.linear(1.0, 400), batch)
    shown["seesaw"] = s.seesaw(s.cosine(1.0, 280), 280, 8, 0.7)[0]
    shown["shift"] = s.shift(s.cosine(1.0, 120), 60)
    return shown


def gallery() -> Figure:
    """The figure, one panel a schedule."""
    shown = panels()
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.0 * COLUMNS, 1.35 * rows), layout="constrained")
    grid = list(figure.subplots(rows, COLUMNS, sharex=True, sharey=True).flat)
    for axes, (title, schedule) in zip(grid, shown.items(), strict=False):
        axes.plot(COUNTS, np.asarray(schedule(jnp.asarray(COUNTS))), color="#0072B2", linewidth=1.4)
        axes.set_title(title, fontsize=8)
        axes.set(xlim=(0, STEPS), ylim=(-0.03, 1.06), xticks=(0, STEPS), yticks=(0, 1))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("updates made, of 200", fontsize=8)
    figure.supylabel("value, relative to the peak", fontsize=8)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "ravine"
    target = Path(__file__).with_name("schedules.svg")
    gallery().savefig(target, metadata={"Date": None})
    print(target.name)
