"""The report of a race: a page that needs no other file."""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from ..batch_schedule import CONSTANT
from ..colours import colour
from ..config import RunConfig
from ..data.corpus import Corpus
from ..run.files import write_text
from ..run.meta import provenance
from ..run.outcome import Outcome
from ..schedule_free import schedules_in_words
from .charts import specification
from .hardware import COLUMNS, hardware_rows
from .summary import REFERENCE, difference, ranked, summary_columns, summary_rows, summary_table

VEGA_LITE = "6.1"


def headline(outcomes: Sequence[Outcome], run: RunConfig) -> str:
    """The outcome of a race in a sentence or two.

    Args:
      outcomes: of all optimizers and seeds.
      run: of the race; where batches grow, tokens are compared, not updates.

    Example:
      >>> from ravine.training.compare.report import headline
      >>> from ravine.training.run.outcome import Outcome
      >>> from ravine.training.config import RunConfig
      >>> headline([Outcome("adamw", 0.1)], RunConfig())
      'No optimizer has come to its end.'
    """
    order = [o for o in ranked(outcomes) if o.status == "finished"]
    if not order:
        return "No optimizer has come to its end."
    first = order[0].name
    best = [o for o in order if o.name == first]
    loss = statistics.fmean(o.final_loss for o in best)
    told = f"{first} ends lowest, at {loss:.3g} nats per token"
    reference = {o.repeat: o for o in order if o.name == REFERENCE}
    if first == REFERENCE or not reference:
        return f"{told}."
    pairs = [(o, reference[o.repeat]) for o in best if o.repeat in reference]
    gaps = [o.final_loss - r.final_loss for o, r in pairs]
    if len(gaps) > 1:
        told += f": {difference(gaps)} against {REFERENCE}, over {len(gaps)} seeds"
    elif gaps:
        told += (
            f", {-gaps[0]:.3f} below {REFERENCE}; one seed does not show how much of it is chance"
        )
    reached = [(o, found["step"]) for o, r in pairs if (found := o.reaching(r.final_loss))]
    if not reached:
        return f"{told}."
    against = pairs[0][1]
    last = against.evaluations[-1]["step"]
    after = f"{statistics.fmean(step for _, step in reached):.0f} of {last} steps"
    if run.batches != CONSTANT:
        tokens = statistics.fmean(o.tokens(step, run) for o, step in reached)
        after = f"{tokens:,.0f} of {against.tokens(last, run):,} tokens"
    return f"{told}. It passes {REFERENCE}'s last loss after {after}."


def write_report(out: Path, outcomes: list[Outcome], run: RunConfig, corpus: Corpus) -> Path:
    """Writes ``report.html``, which needs no other file, and returns its path."""
    path, race = out / "report.html", out / "race.json"
    optimizers: dict[str, Any] = {}
    if race.exists():
        optimizers = json.loads(race.read_text(encoding="utf-8")).get("optimizers", {})
    write_text(path, _render(outcomes, run, corpus, optimizers))
    return path


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
        _render([trial], run, corpus, {})
        summary_table([trial], run)
    except Exception as error:
        raise ValueError(
            f"the report of the race cannot be made ({type(error).__name__}: {error}); put that right "
            "first, it is what a race is for."
        ) from error


def _render(
    outcomes: list[Outcome], run: RunConfig, corpus: Corpus, optimizers: dict[str, Any]
) -> str:
    order = ranked(outcomes)
    names = list(dict.fromkeys(o.name for o in order or outcomes))
    spec = specification(order, run) if order else None
    rows = lambda found: [{"cells": cells, "colour": colour(cells[0])} for cells in found]
    grows = run.batches != CONSTANT
    counted = "Tokens" if grows else "Steps"
    steps = "A step's median time is over batches of all sizes. " if grows else ""
    return _template().render(
        names=names,
        headline=headline(outcomes, run),
        parameters=f"{order[0].parameters:,}" if order else "-",
        data=_data(run),
        text=corpus.description,
        columns=summary_columns(outcomes, run),
        rows=rows(summary_rows(outcomes, run)),
        hardware_columns=list(COLUMNS),
        hardware=rows(hardware_rows(order, run)),
        note=(
            f"Seconds count training only, without compilation and evaluation. {counted} and seconds "
            f"to {REFERENCE}'s loss are interpolated between evaluations {run.eval_every} updates "
            f"apart. {steps}Compare final losses: curves cross while the learning rate decays. A model "
            "this small overstates what matrix methods gain on large ones."
        ),
        spec=spec,
        script=_script() if spec else "",
        still=_still(json.dumps(spec)) if spec else "",
        made={
            **_flat(provenance()),
            "command": " ".join(["python -m ravine", *sys.argv[1:]]),
        },
        optimizers={name: json.dumps(given) for name, given in optimizers.items()},
        configuration={
            **dataclasses.asdict(run),
            "schedule": schedules_in_words(run, names),
            "text fingerprint": corpus.fingerprint,
        },
    )


def _data(run: RunConfig) -> str:
    """How much every run sees."""
    tokens = f"{run.steps} steps of {run.batch_size * run.model.context:,} tokens each"
    return tokens if run.batches == CONSTANT else f"the data of {tokens}, in batches that grow"


def _read(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files("ravine.training.compare").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    """The page, to be filled in."""
    return jinja2.Environment(autoescape=True).from_string(_read("report.html.j2"))


@functools.cache
def _script() -> str:
    """Vega, Vega-Lite and Vega-Embed, and what draws the page's charts with them."""
    own = _read("report.js")
    return vl_convert.javascript_bundle(own, vl_version=VEGA_LITE).replace("</script", r"<\/script")


@functools.lru_cache(maxsize=2)
def _still(spec: str) -> str:
    """The first charts as they are without scripts: speed-up and held-out loss."""
    charts = json.loads(spec)
    charts["concat"] = charts["concat"][:2]
    return vl_convert.vegalite_to_svg(charts, vl_version=VEGA_LITE)


def _flat(found: dict[str, Any]) -> dict[str, str]:
    """Nested values in words."""
    return {
        name.replace("_", " "): ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, dict)
        else str(value)
        for name, value in found.items()
    }
