"""The planner's tables: memory, costs, and what follows from them."""

import dataclasses
import json
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from .by_hand import Work
from .chips import DECOMPOSITIONS
from .cost import Plan
from .network import Network
from .roofline import ASSUMPTIONS
from .verdict import milliseconds, readable, spare, thousands, verdict

if TYPE_CHECKING:
    from .plan import PlanConfig


@dataclasses.dataclass(frozen=True)
class Shown:
    """The inputs of the plans."""

    config: "PlanConfig"
    work: Work
    network: Network
    assumed: dict[str, dict[str, object]]
    """By optimizer: what differs from its defaults."""


def show(made: Shown, plans: list[Plan], console: Console) -> None:
    """Prints the plans of one model."""
    config, work, chip = made.config, made.work, made.network.chip
    what = "a train step" if config.train_step else "one update"
    slices = f" in {config.slices} slices" if config.slices > 1 else ""
    layers = ", layer matrices only" if config.layers_only else ""
    console.print(
        f"{config.model}: {work.shape.count / 1e9:.2f} billion parameters in bfloat16{layers}, "
        f"{what} of {work.tokens:,} tokens on {config.topology}{slices} ({config.mesh}); "
        "numbers are per chip, times in ms"
    )
    done = [found for found in plans if not found.refused]
    if done and config.compare:
        print_whole(console, _compared(made, done))
    elif done:
        print_whole(console, _memory(made, done))
        print_whole(console, _time(done))
    for found in plans:
        for line in _short(made, found) if config.compare else _lines(made, found):
            console.print(line)
    # In a train step its products are counted with all others.
    attention = "" if config.train_step else f" and attention at {chip.attention:.0%}"
    again = {"full": "with layers recomputed", "products": "with products kept", "none": "as it is"}
    console.print(
        ASSUMPTIONS.format(
            reached=chip.reached,
            attention=attention,
            remat=again[config.remat],
            decompositions=DECOMPOSITIONS,
        )
    )
    if chip.node:
        console.print(
            "No compiler for GPUs is at hand: temporaries and collectives are those that XLA for CPU "
            "makes of as many devices."
        )


def print_whole(console: Console, table: Table) -> None:
    """Prints all columns, on a console that is too narrow as well: rich would cut their numbers."""
    width = console.width
    console.width = max(
        width, console.measure(table, options=console.options.update(width=1000)).maximum
    )
    console.print(table)
    console.width = width


def _compared(made: Shown, plans: list[Plan]) -> Table:
    """One table for many."""
    table = _table(
        *("state", "sum", "fits", "sent", "update", "sending", "at times", "step", "opt."),
        *("tok/s", "MFU"),
    )
    for found in plans:
        e = found.estimate
        table.add_row(
            found.optimizer,
            *map(readable, (found.state, found.memory)),
            "yes" if spare(found, made.network.chip) >= 0 else "no",
            readable(found.sent),
            *(milliseconds(x) for x in (e.update, e.exchanges, e.at_times, e.step)),
            *(f"{e.share:.1%}", thousands(e.tokens_per_second), f"{e.mfu:.0%}"),
        )
    return table


def _memory(made: Shown, plans: list[Plan]) -> Table:
    master = ["master"] if made.config.master_copy else []
    hosted = ["on host"] if made.config.state_on_host else []
    headings = ("grads", "state", *hosted, "temp.", "activations", "sum", "left", "checkpoint")
    table = _table("params", *master, *headings)
    for found in plans:
        copy = [found.master] if master else []
        there = [found.host] if hosted else []
        sizes = (found.parameters, *copy, found.gradients, found.state, *there, found.temporary)
        table.add_row(
            found.optimizer,
            *map(readable, sizes),
            *map(readable, (found.activations, found.memory)),
            readable(spare(found, made.network.chip)),
            readable(found.checkpoint),
        )
    return table


def _time(plans: list[Plan]) -> Table:
    table = _table(
        *("GFLOP", "at times", "sent", "update", "sending", "at times", "model", "exposed"),
        *("step", "opt.", "tok/s", "MFU"),
    )
    for found in plans:
        e = found.estimate
        parts = (e.update, e.exchanges, e.at_times, e.model, e.exposed, e.step)
        table.add_row(
            found.optimizer,
            *(f"{x / 1e9:,.0f}" for x in (found.arithmetic.always, found.arithmetic.sometimes)),
            readable(found.sent),
            *(milliseconds(x) for x in parts),
            *(f"{e.share:.1%}", thousands(e.tokens_per_second), f"{e.mfu:.0%}"),
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("optimizer", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _short(made: Shown, found: Plan) -> list[str]:
    """What a row of the common table leaves out: why one does not fit, and what differs."""
    said = _lines(made, found)
    if not found.refused and spare(found, made.network.chip) >= 0:
        said = said[1:]
    about = ("does not fit", "not the library's", "with `", "without", "leaves out")
    return [line for line in said if found.refused or any(word in line for word in about)]


def _lines(made: Shown, found: Plan) -> list[str]:
    name, chip = found.optimizer, made.network.chip
    if found.refused:
        return [f"{name}: {found.refused}"]
    lines = [f"{name}: {verdict(found, chip, made.work)}"]
    by_kind: dict[str, list[float]] = {}
    for c in found.collectives:
        times, sent = by_kind.setdefault(c.kind, [0, 0.0])
        by_kind[c.kind] = [times + c.times, sent + c.total]
    said = [f"{int(n)} {kind} sending {readable(x)}" for kind, (n, x) in sorted(by_kind.items())]
    looped = sum(c.times for c in found.collectives if c.in_loop)
    lines.append(
        f"{name}: {', '.join(said) or 'no collective'}{f'; {looped} in loops' if looped else ''}"
    )
    if assumed := made.assumed.get(name):
        options = json.dumps({k: _plain(v) for k, v in assumed.items()})
        lines.append(f"{name}: not the library's defaults, but {options}")
    if name.startswith("sophia") and not made.config.train_step:
        lines.append(
            f"{name}: without its estimate of the curvature, a pass through the model at times"
        )
    if found.arithmetic.uncounted:
        names = ", ".join(sorted(found.arithmetic.uncounted))
        lines.append(f"{name}: GFLOP leaves out what is not counted: {names}")
    copies = max(found.repeated.values(), default=1)
    if copies > 1:
        paths = [path for path, n in found.repeated.items() if n == copies]
        lines.append(
            f"{name}: {len(paths)} arrays of the state have {copies} copies each, as {paths[0]}"
        )
    if found.on_host:
        lines.append(
            f"{name}: the state is on the host, and {milliseconds(2 * found.state / chip.host)} ms of "
            "the update move it to the chip and back; what is on the chip meanwhile is a temporary"
        )
    writing = found.checkpoint / len(made.network.places) / chip.network
    lines.append(
        f"{name}: a checkpoint of {readable(found.checkpoint)} takes at least "
        f"{milliseconds(writing)} ms through the chips' network"
    )
    return lines


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: getattr(value, f.name)
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        }
        return {type(value).__name__: changed}
    return value
