"""What an optimizer costs the machine, next to its effect on the loss."""

import bisect
import statistics
from collections.abc import Sequence

import jax
from rich import box
from rich.table import Table

from ..batch_schedule import CONSTANT
from ..config import RunConfig
from ..cost import Cost
from ..run.outcome import Outcome

COLUMNS = {
    "optimizer": "optimizer",
    "tokens per second": "tokens/ s",
    "Mflop per step": "Mflop",
    "of it the optimizer's": "opti- mizer",
    "Mflop more in a refresh": "re- fresh",
    "peak memory MB": "peak MB",
    "optimizer state MB": "state MB",
    "lowest loss": "lowest loss",
}
"""Headings, as the page has them and as a terminal has room for."""


def hardware_rows(
    outcomes: Sequence[Outcome], run: RunConfig, device_kind: str | None = None
) -> list[list[str]]:
    """A row per optimizer, of its first seed, in the order given; headings are the keys of `COLUMNS`.

    Tokens per second are those of the median step of all seeds, with the model's FLOP utilization where
    the device's peak is known. Where batches grow, they are those of the first seed's whole run, without
    utilization, and operations and memory are those of its largest batch. "Lowest loss" is when no other
    optimizer had reached a lower held-out loss: together these spans are the Pareto front of loss
    against time.
    """
    device_kind = device_kind or jax.devices()[0].device_kind
    first = {o.name: o for o in reversed(outcomes) if o.steps and o.cost}
    spans, rows = front(list(first.values())), []
    for name in dict.fromkeys(o.name for o in outcomes if o.name in first):
        cost = Cost(**first[name].cost)  # pyright: ignore[reportArgumentType]
        runs = [o.step_milliseconds for o in outcomes if o.name == name and o.steps]
        seconds = 1e-3 * statistics.median(runs)
        speed = f"{run.batch_size * run.model.context / seconds:,.0f}"
        used = cost.utilization(seconds, device_kind, run.model.dtype)
        if run.batches != CONSTANT:  # a median step is no measure of steps that grow
            last = first[name].steps[-1]
            speed = f"{first[name].tokens(last['step'] + 1, run) / last['seconds']:,.0f}"
            used = None
        rows.append(
            [
                name,
                speed if used is None else f"{speed} (MFU {used:.0%})",
                f"{cost.step_flop / 1e6:,.0f}",
                f"{cost.optimizer_share:.1%}",
                f"{cost.refresh_flop / 1e6:,.0f}",
                f"{cost.peak_bytes / 1e6:,.1f}",
                f"{cost.state_bytes / 1e6:,.1f}",
                ", ".join(f"{a:.3g}-{b:.3g} s" for a, b in spans[name]) or "never",
            ]
        )
    return rows


def hardware_table(outcomes: Sequence[Outcome], run: RunConfig) -> Table:
    """The same for a terminal, 80 columns wide."""
    caption = "per step and device, counted; lowest loss: when it led, in seconds of training"
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = hardware_rows(outcomes, run)
    for index, heading in enumerate(COLUMNS.values()):
        # Headings may wrap, cells may not; but of the last there may be several spans.
        width = max([len(row[index]) for row in rows] + [len(word) for word in heading.split()])
        table.add_column(
            heading,
            justify="right" if index else "left",
            min_width=min(width, 20),
            max_width=min(width, 20),
        )
    for row in rows:
        table.add_row(*row)
    return table


def front(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """When each had the lowest held-out loss reached so far, in seconds of training.

    The spans begin with the first evaluation of any, and end where the longest run does.

    Example:
      >>> from ravine.training.compare.hardware import front
      >>> from ravine.training.run.outcome import Outcome
      >>> def run(name, *points):
      ...     evaluated = [{"step": 0, "seconds": t, "heldout_loss": loss} for t, loss in points]
      ...     return Outcome(name, 0.1, evaluations=evaluated)
      >>> front([run("fast", (1.0, 3.0), (2.0, 2.5)), run("slow", (3.0, 2.0), (6.0, 1.0))])
      {'fast': [(1.0, 3.0)], 'slow': [(3.0, 6.0)]}
    """
    reached = {o.name: _reached(o) for o in outcomes}
    times = sorted({seconds for points in reached.values() for seconds, _ in points})
    spans: dict[str, list[tuple[float, float]]] = {o.name: [] for o in outcomes}
    for at, seconds in enumerate(times):
        until = times[at + 1] if at + 1 < len(times) else seconds
        losses = {name: _at(points, seconds) for name, points in reached.items()}
        name = min(losses, key=losses.__getitem__)
        if spans[name] and spans[name][-1][1] == seconds:
            spans[name][-1] = (spans[name][-1][0], until)
        elif until > seconds or at + 1 == len(times):
            spans[name].append((seconds, until))
    return spans


def _reached(outcome: Outcome) -> list[tuple[float, float]]:
    """Seconds, and the lowest loss by then."""
    points, lowest = [], float("inf")
    for entry in outcome.evaluations:
        lowest = min(lowest, entry["heldout_loss"])
        points.append((entry["seconds"], lowest))
    return points


def _at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    at = bisect.bisect_right([time for time, _ in points], seconds)
    return points[at - 1][1] if at else float("inf")
