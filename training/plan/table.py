"""What the planner prints: a table of what was found, and what follows from it."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ..sharding import mesh_sizes

if TYPE_CHECKING:
    from .plan import Plan, PlanConfig

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
"""Gigabytes per chip, by generation (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

_HEADINGS = ("params", "grads", "state", "temp.", "sum", "GFLOP", "at times")
_COMMUNICATION = ("collectives", "sent", "at times", "in loops", "s")


def show(
    config: "PlanConfig",
    count: int,
    tokens: int,
    plans: "list[Plan]",
    assumed: dict[str, dict[str, object]],
    console: Console,
) -> None:
    """Prints the plans of one model, whose parameters are `count`, for a step of so many tokens."""
    what = f"a train step of {tokens:,} tokens" if tokens else "one update"
    sizes = mesh_sizes(config.mesh)
    memory = HBM[config.topology.partition(":")[0]]
    console.print(
        f"{config.model}: {count / 1e9:.2f} billion parameters in bfloat16 on {config.topology} "
        f"({config.mesh}), {what}; numbers are per chip"
    )
    console.print(_table(plans))
    for found in plans:
        for line in _lines(found, memory, assumed.get(found.optimizer, {})):
            console.print(line)
    if config.batch and not tokens:
        model = 6 * count * config.batch / math.prod(sizes.values())
        for found in plans:
            always, more = found.arithmetic.always / model, found.arithmetic.sometimes / model
            console.print(
                f"{found.optimizer}: {always:.3%} of the model's {model / 1e9:,.0f} GFLOP, and at "
                f"times {more:.3%} more"
            )


def _table(plans: "list[Plan]") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("optimizer")
    for heading in (*_HEADINGS, *_COMMUNICATION):
        table.add_column(heading, justify="right")
    for found in plans:
        sizes = (found.parameters, found.gradients, found.state, found.temporary, found.memory)
        table.add_row(
            found.optimizer,
            *map(_readable, sizes),
            *(f"{x / 1e9:,.1f}" for x in (found.arithmetic.always, found.arithmetic.sometimes)),
            str(sum(c.times for c in found.collectives)),
            *map(_readable, (found.sent, found.sent_at_times)),
            str(sum(c.times for c in found.collectives if c.in_loop)),
            f"{found.seconds:.0f}",
        )
    return table


def _lines(found: "Plan", memory: int, assumed: dict[str, object]) -> list[str]:
    name, spare = found.optimizer, memory * 1e9 - found.memory
    verdict = f"fits in {memory} GB with {_readable(spare)} to spare"
    if spare < 0:
        verdict = (
            f"does not fit in {memory} GB, by {_readable(-spare)}; shard over more chips, or keep the "
            "state in narrower dtypes"
        )
    by_kind: dict[str, list[float]] = {}
    for c in found.collectives:
        times, sent = by_kind.setdefault(c.kind, [0, 0.0])
        by_kind[c.kind] = [times + c.times, sent + c.total]
    said = [f"{int(n)} {kind} sending {_readable(x)}" for kind, (n, x) in sorted(by_kind.items())]
    lines = [f"{name}: {verdict}", f"{name}: {', '.join(said) or 'no collective'}"]
    if assumed:
        options = json.dumps({k: _plain(v) for k, v in assumed.items()})
        lines.append(f"{name}: not the library's defaults, but {options}")
    if found.arithmetic.uncounted:
        names = ", ".join(sorted(found.arithmetic.uncounted))
        lines.append(f"{name}: GFLOP leaves out what is not counted: {names}")
    for copies in sorted(set(found.repeated.values()), reverse=True):
        paths = [path for path, n in found.repeated.items() if n == copies]
        lines.append(
            f"{name}: {len(paths)} arrays of the state are on {copies} chips each, as {paths[0]}"
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


def _readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
