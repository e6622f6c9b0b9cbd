"""The race: several optimizers train the same model on the same text, compared at the end."""

import dataclasses
import datetime
import hashlib
import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
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
from .loop import train
from .outcome import Outcome
from .processes import LaunchConfig, check_same, from_first, is_first, start, unanimous
from .report import summary_table, write_report
from .sharding import batch_sharding, build_mesh
from .step import place
from .tuning import Entrant, line_up


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Train several optimizers on the same model and text, and compare them."""

    optimizers: str = "adamw,muon,shampoo,soap,lion,sgd"
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
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)

    def asked(self) -> dict[str, Any]:
        """What decides the results, as JSON values."""
        kept = dataclasses.replace(
            self, out=None, overwrite=False, resume=False, launch=LaunchConfig()
        )
        return to_json(kept)


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
    start(config.launch)
    console = console or Console(quiet=not is_first())
    with unanimous():
        entrants = line_up(config.optimizers, config.learning_rates)
        corpus = load_corpus(config.run.data)
        run = dataclasses.replace(
            config.run, model=dataclasses.replace(config.run.model, vocabulary=corpus.vocabulary)
        )
        mesh = build_mesh(config.launch.mesh)
        transformations = _check(run, entrants, corpus, mesh)
    check_same("text", corpus.fingerprint)
    check_same("configuration", _digest(config))
    with unanimous():
        out = _prepare(config) if is_first() else Path()
    out = Path(from_first(str(out.absolute())))
    outcomes = [Outcome(entrant.name, entrant.learning_rate) for entrant in entrants]
    console.print(f"text: {corpus.description}", highlight=False)
    console.print(f"results: {out}", highlight=False)
    try:
        with _progress(console) as progress:
            for entrant, tx, outcome in zip(entrants, transformations, outcomes, strict=True):
                folder = out / entrant.name
                if from_first("ended" if config.resume and outcome.load(folder) else ""):
                    continue
                if is_first():
                    folder.mkdir(exist_ok=True)
                    _write_meta(folder, run, entrant, corpus, mesh)
                _run_one(run, tx, corpus, outcome, folder, progress, mesh)
                if is_first():
                    outcome.save(folder)
    finally:
        if is_first():
            console.print(summary_table(outcomes))
            report = write_report(out, outcomes, run, corpus)
            console.print(f"report: {report}", highlight=False)
    return outcomes


def _check(
    run: RunConfig, entrants: tuple[Entrant, ...], corpus: Corpus, mesh: Mesh
) -> list[optax.GradientTransformation]:
    """Builds all that can refuse its configuration, without running anything."""
    sizes: Any = {"batch_size": run.batch_size, "context": run.model.context}
    train_batches(corpus, seed=run.seed, **sizes)
    heldout_batches(corpus, batches=run.eval_batches, **sizes)
    batch_sharding(mesh, run.batch_size)
    built = [entrant.build(run) for entrant in entrants]
    for tx in built:
        place(run.model, tx, mesh)
    return built


def _prepare(config: RaceConfig) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = config.out or Path("runs") / f"race-{stamp}"
    asked = config.asked()
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
    mesh: Mesh,
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

    train(run, tx, corpus, outcome, folder, show, mesh)
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


def _digest(config: RaceConfig) -> str:
    return hashlib.sha256(json.dumps(config.asked(), sort_keys=True).encode()).hexdigest()


def _write_meta(folder: Path, run: RunConfig, entrant: Entrant, corpus: Corpus, mesh: Mesh) -> None:
    packages = ("ravine", "jax", "jaxlib", "optax", "flax", "numpy", "grain")
    meta = {
        "optimizer": json.loads(entrant.optimizer.to_json()),
        "learning_rate": entrant.learning_rate,
        "run": to_json(run),
        "text": {"description": corpus.description, "fingerprint": corpus.fingerprint},
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{jax.devices()[0].device_kind} ({jax.devices()[0].platform})",
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
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
