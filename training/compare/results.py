"""The tables of docs/results.md: `python -m ravine.training.compare.results [RACE_FOLDER ...]`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import RunConfig
from ..config_file import filled
from ..run.outcome import Outcome
from .hardware import COLUMNS, hardware_rows
from .summary import ranked, summary_columns, summary_rows
from .sweep import TRIALS, derived, read_trials

PAGE = Path(__file__).parents[2] / "docs" / "results.md"

Table = Literal["", "losses", "hardware"]
"""Of a race: all of its summary, the part that a busy machine does not change, or what it costs."""


def sweep_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table in Markdown: of every optimizer the best trial, and the best three learning rates.

    Args:
      rows: of `read_trials`.
    """
    table = derived(rows)["optimizers"]
    lines = [
        "| optimizer | held-out loss | learning rate | decay per step | warm-up | other | "
        "rates of the three best short trials |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for name, row in sorted(table.items(), key=lambda item: item[1]["heldout_loss"]):
        mine = [r for r in rows if r["optimizer"] == name and r["heldout_loss"] is not None]
        short = min(r["steps"] for r in mine)
        best = sorted((r for r in mine if r["steps"] == short), key=lambda r: r["heldout_loss"])[:3]
        near = ", ".join(f"{r['learning_rate']:.2g} ({r['heldout_loss']:.2f})" for r in best)
        other = " ".join(
            f"{key}={json.dumps(value)}" for key, value in row["hyperparameters"].items()
        )
        lines.append(
            f"| `{name}` | {row['heldout_loss']:.3f} | {row['learning_rate']:.3g} | "
            f"{row['weight_decay']:.2g} | {row['warmup']:.2g} | {other} | {near} |"
        )
    return lines


def race_lines(folder: Path, table: Table = "") -> list[str]:
    """The table of a race in Markdown, from the files in its folder.

    Args:
      folder: `--out` of the race.
      table: which.

    Raises:
      ValueError: for a folder without a finished race.
    """
    outcomes: list[Outcome] = []
    run, told_device = RunConfig(), ""
    for meta in sorted(folder.glob("*/meta.json")):
        made = json.loads(meta.read_text(encoding="utf-8"))
        run, told_device = filled(RunConfig(), made["run"]), made["device"]
        told = json.loads((meta.parent / "outcome.json").read_text(encoding="utf-8"))
        outcome = Outcome(told["name"], told["learning_rate"], told["repeat"])
        outcome.load(meta.parent, run)
        outcomes.append(outcome)
    if not outcomes:
        raise ValueError(f"{folder} holds no race; give the --out of a finished one.")
    if table == "hardware":
        columns = list(COLUMNS)
        rows = hardware_rows(ranked(outcomes), run, told_device)
    else:
        columns, rows = summary_columns(outcomes, run), summary_rows(outcomes, run)
    if table == "losses":
        kept = [index for index, column in enumerate(columns) if not _is_timed(column)]
        columns, *rows = ([row[index] for index in kept] for row in (columns, *rows))
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def _is_timed(column: str) -> bool:
    return column.startswith("seconds") or column in (
        "median step ms",
        "of it optimizer ms",
        "compile s",
    )


def fill(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with new lines between ``<!-- name -->`` and ``<!-- end -->``.

    Example:
      >>> from ravine.training.compare.results import fill
      >>> fill("a\\n<!-- race -->\\nold\\n<!-- end -->\\nb", "race", ["new"])
      'a\\n<!-- race -->\\nnew\\n<!-- end -->\\nb'
    """
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition("<!-- end -->")
    return f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}"


def main(folders: Sequence[str]) -> None:
    """Writes the tables: that of the sweep, and those of the races ``name=folder``.

    Raises:
      ValueError: for a name that the page has no place for.
    """
    page = fill(PAGE.read_text(encoding="utf-8"), "sweep", sweep_lines(read_trials(TRIALS)))
    for given in folders:
        name, _, folder = given.partition("=")
        places = {f"{name} {table}".strip(): table for table in get_args(Table)}
        here = {place: t for place, t in places.items() if f"<!-- {place} -->\n" in page}
        if not here:
            raise ValueError(f"{PAGE.name} has no place for {name!r}; write <!-- {name} --> there.")
        for place, table in here.items():
            page = fill(page, place, race_lines(Path(folder), table))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
