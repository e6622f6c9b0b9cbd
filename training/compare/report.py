"""What a race shows at its end: a table in the terminal and a self-contained page with curves."""

import dataclasses
import io
import math
import os
import statistics
from importlib import resources
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table

try:
    import matplotlib
    from matplotlib.figure import Figure
except ValueError as error:  # it checks the variable, whether a backend is needed or not
    raise ValueError(
        f"matplotlib refuses MPLBACKEND={os.environ.get('MPLBACKEND')!r}; unset it, a report needs none."
    ) from error

from ..colours import colour
from ..config import RunConfig
from ..data.corpus import Corpus
from ..run.files import write_text
from ..run.outcome import Outcome
from .hardware import COLUMNS, hardware_rows

REFERENCE = "adamw"
STYLES = ("-", "--", ":")
SOLID = 7
"""So many lines are told apart by colour alone; more of them are dashed or dotted too."""


# Of several seeds the terminal has no room for these; the page has them.
_PAGE = (
    "bits per byte",
    f"seconds to {REFERENCE}'s loss",
    "of it optimizer ms",
    "compile s",
    "state bytes per parameter",
)


def _columns(outcomes: list[Outcome]) -> list[tuple[str, str]]:
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
        (f"steps to {REFERENCE}'s loss", "steps to it"),
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


def ranked(outcomes: list[Outcome]) -> list[Outcome]:
    """First what finished, best mean first, the runs of an optimizer one after the other."""
    started = [outcome for outcome in outcomes if outcome.steps]

    def place(outcome: Outcome) -> tuple[bool, float, str, int]:
        same = [other for other in started if other.name == outcome.name]
        unfinished = any(other.status != "finished" for other in same)
        return unfinished, _mean([o.final_loss for o in same]), outcome.name, outcome.repeat

    return sorted(started, key=place)


def _rows(outcomes: list[Outcome]) -> list[list[str]]:
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
        reached = [found for o, r in pairs if (found := o.reaching(r.final_loss))]
        reached = reached if finished and len(reached) == len(runs) else []
        bits = _mean([b for o in done if (b := _bits(o)) is not None])
        rows.append(
            [
                name,
                f"{runs[0].learning_rate:.3g}",
                str(runs[0].trials or "-"),
                f"{_mean(losses):.3g}{error}" if finished else status,
                *(
                    [_difference([o.final_loss - r.final_loss for o, r in others])]
                    if several
                    else []
                ),
                *([f"{bits:.3g}" if finished else "-"] if with_bits else []),
                _number(_mean([found["step"] for found in reached]), 0),
                _number(_mean([found["seconds"] for found in reached]), 1),
                _number(statistics.median(outcome.step_milliseconds for outcome in runs), 1),
                _number(statistics.median(o.optimizer_milliseconds for o in runs), 2),
                _number(runs[0].compile_seconds, 1),
                _number(runs[0].state_bytes_per_parameter, 1),
            ]
        )
    return rows


def _difference(differences: list[float]) -> str:
    """Mean of paired differences and its standard error; noise where it is below two of them."""
    error = _error(differences)
    if not math.isfinite(error):
        return "-"
    mean = _mean(differences)
    noise = " (noise)" if abs(mean) < 2 * error else ""
    return f"{mean:+.3f} ± {error:.3f}{noise}"


def summary_columns(outcomes: list[Outcome]) -> list[str]:
    """Headings of `summary_rows`."""
    return [heading for heading, _ in _columns(outcomes)]


def summary_rows(outcomes: list[Outcome]) -> list[list[str]]:
    """A race's results, best held-out loss first, a row per optimizer."""
    return _rows(outcomes)


def summary_table(outcomes: list[Outcome]) -> Table:
    """The table printed at the end of a race, best held-out loss first, 80 columns wide."""
    several = any(outcome.repeat for outcome in outcomes)
    what = ", mean ± standard error; steps" if several else "; steps and seconds"
    caption = f"held-out loss in nats per token{what} to {REFERENCE}'s last one"
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows, columns = _rows(outcomes), _columns(outcomes)
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


def _figure(
    title: str, x: str, y: str, curves: list[tuple[str, dict, list[float], list[float]]], log: bool
) -> str:
    figure = Figure(figsize=(6.4, 4.2))
    figure.subplots_adjust(left=0.13, right=0.98, top=0.92, bottom=0.12)
    axes = figure.subplots()
    for name, style, xs, ys in curves:
        # One evaluation is a point, of which a line shows nothing.
        marker = "o" if len(xs) == 1 else None
        axes.plot(xs, ys, label=name, linewidth=1.8, marker=marker, **style)
    axes.set(title=title, xlabel=x, ylabel=y)
    if log and any(curve[3] for curve in curves):
        axes.set_yscale("log")
        # A decay to zero would take most of the axis: stop three decades below the lowest peak.
        drawn = [ys for *_, ys in curves if ys]
        axes.set_ylim(bottom=max(1e-3 * min(map(max, drawn)), 0.8 * min(map(min, drawn))))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    # Text stays text: smaller, and readable by search and screen readers.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(average / norm)
    return out


def _figures(outcomes: list[Outcome], style: dict[str, dict]) -> list[str]:
    def curves(records: str, x: str, y: str, smooth: bool = False):
        drawn = []
        for outcome in ranked(outcomes):
            rows = [r for r in getattr(outcome, records) if y in r and math.isfinite(r[y])]
            ys = [r[y] for r in rows]
            drawn.append(
                (
                    outcome.name if outcome.repeat == 0 else "_",
                    style[outcome.name],
                    [r[x] for r in rows],
                    _smoothed(ys) if smooth else ys,
                )
            )
        return drawn

    held_out = "held-out loss, nats per token"
    steps, seconds = "updates", "seconds of training"
    norm = "global norm"
    evaluated = curves("evaluations", "step", "heldout_loss")
    timed = curves("evaluations", "seconds", "heldout_loss")
    trained = curves("steps", "step", "loss", smooth=True)
    rate = curves("steps", "step", "learning_rate")
    update = curves("steps", "step", "update_norm")
    gradient = curves("steps", "step", "gradient_norm")
    return [
        _figure("Held-out loss", steps, held_out, evaluated, log=False),
        _figure("Held-out loss against time", seconds, held_out, timed, log=False),
        _figure("Training loss, moving average", steps, "nats per token", trained, log=False),
        _figure("Learning rate", steps, "learning rate", rate, log=True),
        _figure("Norm of the updates", steps, norm, update, log=True),
        _figure("Norm of the gradients before clipping", steps, norm, gradient, log=True),
    ]


def try_report(run: RunConfig, corpus: Corpus) -> None:
    """Makes a report of invented numbers and throws it away.

    Raises:
      ValueError: if there is anything that keeps a report from being made, before a run is spent on it.
    """
    record = {"step": 0, "seconds": 1.0, "loss": 1.0, "learning_rate": 1.0}
    record |= {"update_norm": 1.0, "gradient_norm": 1.0}
    evaluation = {"step": 1, "seconds": 1.0, "heldout_loss": 1.0}
    trial = Outcome(REFERENCE, 1.0, 0, "finished", [record], [evaluation])
    try:
        _render([trial], run, corpus)
        summary_table([trial])
    except Exception as error:
        raise ValueError(
            f"the report of the race cannot be made ({type(error).__name__}: {error}); put that right "
            "first, it is what a race is for."
        ) from error


def write_report(out: Path, outcomes: list[Outcome], run: RunConfig, corpus: Corpus) -> Path:
    """Writes ``report.html``, which needs no other file, and returns its path."""
    path = out / "report.html"
    write_text(path, _render(outcomes, run, corpus))
    return path


def _render(outcomes: list[Outcome], run: RunConfig, corpus: Corpus) -> str:
    style = {
        name: {
            "color": colour(name),
            "linestyle": STYLES[index // SOLID % len(STYLES)],
        }
        for index, name in enumerate(dict.fromkeys(o.name for o in outcomes))
    }
    template = (
        resources.files("ravine.training.compare")
        .joinpath("report.html.j2")
        .read_text(encoding="utf-8")
    )
    configuration = {**dataclasses.asdict(run), "text fingerprint": corpus.fingerprint}
    page = jinja2.Environment(autoescape=True).from_string(template)
    order = ranked(outcomes)
    return page.render(
        names=list(style),
        parameters=f"{order[0].parameters:,}" if order else "-",
        steps=run.steps,
        tokens=f"{run.batch_size * run.model.context:,}",
        text=corpus.description,
        columns=[heading for heading, _ in _columns(outcomes)],
        rows=[{"cells": cells, "colour": style[cells[0]]["color"]} for cells in _rows(outcomes)],
        hardware_columns=list(COLUMNS),
        hardware=[
            {"cells": cells, "colour": style[cells[0]]["color"]}
            for cells in hardware_rows(order, run)
        ],
        note=(
            "Seconds count training only, without compilation and evaluation. Steps and seconds to "
            f"{REFERENCE}'s loss are interpolated between evaluations {run.eval_every} updates "
            "apart. Compare final losses: curves cross while the learning rate decays. A model "
            "this small overstates what matrix methods gain on large ones."
        ),
        figures=_figures(outcomes, style) if order else [],
        configuration=list(configuration.items()),
    )
