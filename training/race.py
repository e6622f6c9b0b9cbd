"""The race: several optimizers train the same model on the same text, compared at the end."""

import dataclasses
import datetime
import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import jax
import optax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .config import RunConfig, to_json
from .corpus import Corpus, load_corpus
from .data import heldout_batches, train_batches
from .loop import Outcome, train
from .report import summary_table, write_report
from .step import init_params, init_state
from .tuning import Entrant, line_up


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Train several optimizers on the same model and text, and compare them."""

    optimizers: str = "adamw,muon,lion,sgd"
    """Names, separated by commas."""
    learning_rates: str = ""
    """Peak learning rates that replace the tuned ones: name=value, separated by commas."""
    out: Path | None = None
    """Folder for the results; by default runs/race-DATE-TIME."""
    overwrite: bool = False
    """Replace the results that the folder holds."""
    resume: bool = False
    """Go on with the interrupted race in the folder: runs that ended are kept, the one that was cut
    off continues from its newest checkpoint, or anew if it has none."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


def race(config: RaceConfig, console: Console | None = None) -> list[Outcome]:
    """Runs a race and writes its report.

    Everything is checked before anything is written. A run whose loss stops being finite is
    reported as diverged and the others go on; an interruption (Ctrl-C) leaves the runs finished so
    far in the report and is raised again.

    Args:
      config: what to run.
      console: where to print; by default the terminal.

    Returns:
      The outcomes, in the order of the line-up.

    Raises:
      ValueError: for any part of the configuration that cannot be run.
    """
    console = console or Console()
    entrants = line_up(config.optimizers, config.learning_rates)
    corpus = load_corpus(config.run.data)
    run = dataclasses.replace(
        config.run, model=dataclasses.replace(config.run.model, vocabulary=corpus.vocabulary)
    )
    transformations = _check(run, entrants, corpus)
    out = _prepare(config)
    outcomes = [Outcome(entrant.name, entrant.learning_rate) for entrant in entrants]
    console.print(f"text: {corpus.description}", highlight=False)
    console.print(f"results: {out}", highlight=False)
    try:
        with _progress(console) as progress:
            for entrant, tx, outcome in zip(entrants, transformations, outcomes, strict=True):
                folder = out / entrant.name
                if config.resume and outcome.load(folder):
                    continue
                folder.mkdir(exist_ok=True)
                _write_meta(folder, run, entrant, corpus)
                _run_one(run, tx, corpus, outcome, folder, progress)
                outcome.save(folder)
    finally:
        console.print(summary_table(outcomes))
        report = write_report(out, outcomes, run, corpus)
        console.print(f"report: {report}", highlight=False)
    return outcomes


def _check(
    run: RunConfig, entrants: tuple[Entrant, ...], corpus: Corpus
) -> list[optax.GradientTransformation]:
    """Builds all that can refuse its configuration, without running anything."""
    sizes = {"batch_size": run.batch_size, "context": run.model.context}
    train_batches(corpus, seed=run.seed, **sizes)
    heldout_batches(corpus, batches=run.eval_batches, **sizes)
    built = [entrant.build(run) for entrant in entrants]
    for tx in built:
        jax.eval_shape(lambda tx=tx: init_state(init_params(run.model, run.seed)[1], tx))
    return built


def _prepare(config: RaceConfig) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = config.out or Path("runs") / f"race-{stamp}"
    asked = to_json(dataclasses.replace(config, out=None, overwrite=False, resume=False))
    if config.resume:
        if config.out is None or not (out / "race.json").exists():
            raise ValueError("--resume needs the --out of an earlier race.")
        if json.loads((out / "race.json").read_text(encoding="utf-8")) != asked:
            raise ValueError(f"{out} holds a race of another configuration; repeat its flags.")
        return out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give --out a folder.")
    if out.exists() and any(out.iterdir()):
        if not (out / "race.json").exists():
            raise ValueError(f"{out} holds files that are not a race's; give --out another folder.")
        if not config.overwrite:
            raise ValueError(f"{out} holds another run; give --overwrite or another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "race.json").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return out


def _run_one(
    run: RunConfig,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    folder: Path,
    progress: Progress,
) -> None:
    task = progress.add_task(outcome.name, total=run.steps, loss="compiling", speed="", heldout="")
    tokens = run.batch_size * run.model.context

    def show(record: dict[str, float]) -> None:
        if "heldout_loss" in record:
            progress.update(task, heldout=f"held-out {record['heldout_loss']:.3f}")
            return
        done = record["step"] + 1
        speed = f"{done * tokens / max(record['seconds'], 1e-9):,.0f} tokens/s"
        progress.update(task, completed=done, loss=f"loss {record['loss']:.3f}", speed=speed)

    train(run, tx, corpus, outcome, folder, show)
    if outcome.status == "diverged":
        progress.update(task, loss="[red]diverged[/red]")


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[heldout]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _write_meta(folder: Path, run: RunConfig, entrant: Entrant, corpus: Corpus) -> None:
    packages = ("ravine", "jax", "jaxlib", "optax", "flax", "numpy", "grain")
    meta = {
        "optimizer": json.loads(entrant.optimizer.to_json()),
        "learning_rate": entrant.learning_rate,
        "run": to_json(run),
        "text": {"description": corpus.description, "fingerprint": corpus.fingerprint},
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})",
        "machine": platform.machine(),
        "git_revision": _git_revision(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _git_revision() -> str | None:
    """The revision of the checkout this package lies in; ``None`` for an installed wheel."""
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
