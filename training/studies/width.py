r"""How far the best learning rate moves with the width: `python -m ravine study width`.

The model of the race at several widths, heads as wide at all of them, and at every width learning rates
around the best. With the rules for width (`ravine.width_rule`) rates are those of the base model, and
what each parameter's is multiplied by follows from its shape; the best rate is then to be the same at
all widths. The control has one rate for all parameters of all widths.

Rates are a factor of 2 apart until worse ones lie on both sides of the best, and then a factor of
root 2; a parabola in the logarithm of the rate through those next to the best says where the best is.

One rate is swept for all parameters, so that of the fallback moves with that of the matrices. With a
fallback's rate given, there is a second line for the same optimizer, in which it stays.

Source: Yang et al., 2022, https://arxiv.org/abs/2203.03466 (transfer of the best rate); Qiu et al.,
2025, https://arxiv.org/abs/2512.05620, for matrix optimizers.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from ..compare.runs import kept_losses
from ..identity import to_json
from ..run.files import write_json
from .optimum import Optimum, optimum, search
from .picture import draw_width
from .width_config import WidthStudyConfig
from .width_lines import Line
from .width_runs import WidthRuns

Key = tuple[str, bool, int]
"""The name of a line, whether the rule is used, and a width."""
Found = dict[Key, dict[float, list[float]]]
"""Losses by factor of the tuned rate, one per seed."""


def study_width(config: WidthStudyConfig, console: Console) -> dict[Key, Optimum]:
    """Makes the runs that are missing, prints the table, and writes the numbers and the figure.

    Raises:
      ValueError: for a text or a file of runs that cannot be used.
    """
    found: Found = {}
    lines = config.lines()
    with kept_losses(config.run, config.out / "runs.jsonl") as (corpus, kept):
        runs = WidthRuns(config, corpus, kept, console)
        for ruled in (True, False):
            for width in config.widths:
                for line in (line for line in lines if ruled in line.kinds(config.control)):
                    if width == config.widths[0] and not ruled:
                        found[line.name, ruled, width] = found[line.name, True, width]
                        continue
                    mine = found.setdefault((line.name, ruled, width), {})
                    before = [w for w in config.widths if w < width][-1:]
                    known = found[line.name, ruled, before[0]] if before else {}
                    search(
                        functools.partial(runs.losses, line, ruled, width),
                        mine,
                        min(known, key=lambda f, k=known: float(np.mean(k[f])), default=1.0),
                    )
    best = {key: optimum(losses) for key, losses in found.items() if losses}
    console.print(_table(config, lines, best))
    write_json(config.out / "width.json", _told(config, lines, found, best))
    rates = {line.name: line.entrant.learning_rate for line in lines}
    draw_width(config.out / "width.png", rates, found, best)
    return best


def moved(best: Mapping[Key, Optimum], name: str, ruled: bool) -> tuple[float, float]:
    """By what power of two the best rate moves from the first width to the last, and half of the
    interval of 90 %: Student's, with Welch's degrees of freedom for the errors of the two ends."""
    mine = sorted(key for key in best if key[:2] == (name, ruled))
    first, last = best[mine[0]], best[mine[-1]]
    by, error = last.log2 - first.log2, math.hypot(first.error, last.error)
    if not (first.free and last.free):
        return by, math.inf
    if error == 0:
        return by, 0.0
    free = error**4 / (first.error**4 / first.free + last.error**4 / last.free)
    return by, float(stats.t.ppf(0.95, free)) * error


def _table(config: WidthStudyConfig, lines: Sequence[Line], best: Mapping[Key, Optimum]) -> Table:
    caption = (
        "best learning rates of the base model by a parabola, with standard errors in percent; < or >: "
        "the best one tried is an end of the search. Moved: from the first width to the last, with an "
        "interval of 90 %"
    )
    if any(line.fallback_rate is not None for line in lines):
        caption += ". With a fallback's rate beside the name: rates of the matrices alone"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("optimizer")
    table.add_column("rates")
    for width in config.widths:
        table.add_column(f"{width} wide", justify="right")
    table.add_column("moved", justify="right")
    table.add_column("below root 2")
    for line in lines:
        name, rate = line.name, line.entrant.learning_rate
        for ruled in line.kinds(config.control):
            cells = [_cell(rate, best.get((name, ruled, width))) for width in config.widths]
            row = [name, "by the rule" if ruled else "one for all", *cells]
            ends = [
                best.get((name, ruled, width)) for width in (config.widths[0], config.widths[-1])
            ]
            if all(end is not None and end.inside for end in ends):
                by, half = moved(best, name, ruled)
                told = f" ({2 ** (by - half):.2f} to {2 ** (by + half):.2f})"
                row.append(f"x {2**by:.2f}{told if math.isfinite(half) else ''}")
                sure = "yes" if abs(by) + half < 0.5 else "probably"
                row.append(sure if abs(by) < 0.5 else "no")
            table.add_row(*row)
    return table


def _cell(rate: float, at: Optimum | None) -> str:
    if at is None:
        return "-"
    told = f"{rate * 2**at.log2:.3g}"
    if not at.inside:
        return f"{'<' if at.lowest else '>'} {told}"
    return told if math.isinf(at.error) else f"{told} ± {100 * (2**at.error - 1):.0f}"


def _told(
    config: WidthStudyConfig,
    lines: Sequence[Line],
    found: Found,
    best: Mapping[Key, Optimum],
) -> dict[str, Any]:
    by_name = {line.name: line for line in lines}
    rows = []
    for (name, ruled, width), losses in found.items():
        if losses:
            line, at = by_name[name], best[name, ruled, width]
            rate = line.entrant.learning_rate
            runs = {f"{rate * factor:.5g}": losses[factor] for factor in sorted(losses)}
            row = {"optimizer": line.entrant.name, **line.told, "rule": ruled, "width": width}
            rows.append(row | {"losses": runs, "best_rate": rate * 2**at.log2, **at._asdict()})
    return {"config": to_json(config), "best": rows}
