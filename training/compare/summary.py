"""The table of a race: losses, differences to AdamW, and times."""

import math
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..batch_schedule import CONSTANT
from ..config import RunConfig
from ..run.outcome import Outcome

REFERENCE = "adamw"
"""The optimizer that others are compared with."""

# Of several seeds the terminal has no room for these; the page has them.
_PAGE = (
    "bits per byte",
    f"seconds to {REFERENCE}'s loss",
    "of it optimizer ms",
    "compile s",
    "state bytes per parameter",
)


def _columns(outcomes: list[Outcome], run: RunConfig) -> list[tuple[str, str]]:
    """Headings, as the page has them and as the terminal has room for."""
    several = any(outcome.repeat for outcome in outcomes)
    bits = [("bits per byte", "bits/ byte")] if any(map(_bits, outcomes)) else []
    return [
        ("optimizer", "optimizer"),
        ("learning rate", "peak rate"),
        ("trials", "tri- als"),
        ("held-out loss", "held- out"),
        *([(f"difference to {REFERENCE}", f"less {REFERENCE}")] if several else []),
        *bits,
        (f"million tokens to {REFERENCE}'s loss", "Mtok to it")
        if run.batches != CONSTANT
        else (f"steps to {REFERENCE}'s loss", "steps to it"),
        (f"seconds to {REFERENCE}'s loss", "secs to it"),
        ("median step ms", "step ms"),
        ("of it optimizer ms", "opt. ms"),
        ("compile s", "comp. s"),
        ("state bytes per parameter", "bytes/ param"),
    ]


def _bits(outcome: Outcome) -> float | None:
    return outcome.evaluations[-1].get("heldout_bits_per_byte") if outcome.evaluations else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """First what finished, best mean first, the runs of an optimizer one after the other."""
    started = [outcome for outcome in outcomes if outcome.steps]

    def place(outcome: Outcome) -> tuple[bool, float, str, int]:
        same = [other for other in started if other.name == outcome.name]
        unfinished = any(other.status != "finished" for other in same)
        return unfinished, _mean([o.final_loss for o in same]), outcome.name, outcome.repeat

    return sorted(started, key=place)


def difference(differences: list[float]) -> str:
    """Mean of paired differences and its standard error; noise where it is below two of them.

    Example:
      >>> from ravine.training.compare.summary import difference
      >>> difference([0.1, 0.1, 0.13]), difference([0.1, -0.1, 0.03])
      ('+0.110 ± 0.010', '+0.010 ± 0.059 (noise)')
    """
    error = _error(differences)
    if not math.isfinite(error):
        return "-"
    mean = _mean(differences)
    noise = " (noise)" if abs(mean) < 2 * error else ""
    return f"{mean:+.3f} ± {error:.3f}{noise}"


def summary_columns(outcomes: list[Outcome], run: RunConfig) -> list[str]:
    """Headings of `summary_rows`; arguments as there."""
    return [heading for heading, _ in _columns(outcomes, run)]


def summary_rows(outcomes: list[Outcome], run: RunConfig) -> list[list[str]]:
    """A race's results, best held-out loss first, a row per optimizer.

    Where batches grow, optimizers are compared by the tokens they need, as an update may see any number.

    Args:
      outcomes: of all optimizers and seeds.
      run: of the race.
    """
    order = ranked(outcomes)
    reference = {o.repeat: o for o in order if o.name == REFERENCE and o.status == "finished"}
    several = any(outcome.repeat for outcome in outcomes)
    with_bits = any(map(_bits, outcomes))
    rows = []
    for name in dict.fromkeys(outcome.name for outcome in order):
        runs = [outcome for outcome in order if outcome.name == name]
        done = [outcome for outcome in runs if outcome.status == "finished"]
        finished = len(done) == len(runs)
        losses = [outcome.final_loss for outcome in done]
        error = f" ± {_error(losses):.2g}" if finished and len(done) > 1 else ""
        status = next((o.status for o in runs if o.status != "finished"), "")
        pairs = [(o, reference[o.repeat]) for o in done if o.repeat in reference]
        others = [] if name == REFERENCE else pairs
        reached = [(o, found) for o, r in pairs if (found := o.reaching(r.final_loss))]
        reached = reached if finished and len(reached) == len(runs) else []
        to_it = _number(_mean([found["step"] for _, found in reached]), 0)
        if run.batches != CONSTANT:
            to_it = _number(_mean([1e-6 * o.tokens(found["step"], run) for o, found in reached]), 3)
        bits = _mean([b for o in done if (b := _bits(o)) is not None])
        rows.append(
            [
                name,
                f"{runs[0].learning_rate:.3g}",
                str(runs[0].trials or "-"),
                f"{_mean(losses):.3g}{error}" if finished else status,
                *(
                    [difference([o.final_loss - r.final_loss for o, r in others])]
                    if several
                    else []
                ),
                *([f"{bits:.3g}" if finished else "-"] if with_bits else []),
                to_it,
                _number(_mean([found["seconds"] for _, found in reached]), 1),
                _number(statistics.median(outcome.step_milliseconds for outcome in runs), 1),
                _number(statistics.median(o.optimizer_milliseconds for o in runs), 2),
                _number(runs[0].compile_seconds, 1),
                _number(runs[0].state_bytes_per_parameter, 1),
            ]
        )
    return rows


def summary_table(outcomes: list[Outcome], run: RunConfig) -> Table:
    """The table printed at the end of a race, best held-out loss first, 80 columns wide."""
    several = any(outcome.repeat for outcome in outcomes)
    counted = "million tokens" if run.batches != CONSTANT else "steps"
    what = f", mean ± standard error; {counted}" if several else f"; {counted} and seconds"
    caption = f"held-out loss in nats per token{what} to {REFERENCE}'s last one"
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows, columns = summary_rows(outcomes, run), _columns(outcomes, run)
    shown = [index for index, (name, _) in enumerate(columns) if not several or name not in _PAGE]
    for index in shown:
        # Headings may wrap, cells may not.
        heading = columns[index][1]
        width = max([len(row[index]) for row in rows] + [len(word) for word in heading.split()])
        table.add_column(
            heading, justify="right" if index else "left", min_width=width, max_width=width
        )
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table
