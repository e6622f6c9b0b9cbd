"""The race: several optimizers train the same model on the same text, compared at the end."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

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

from ..checkpoint import steps_of
from ..config import RunConfig
from ..data.bpe import corpus_of
from ..data.buckets import check_local, orbax_writes, url_of
from ..data.corpus import Corpus
from ..distributed import check_same, from_first, is_first, start, unanimous
from ..run import interrupts, tensorboard
from ..run.around import Hooks, RunPaths
from ..run.bucket import Bucket, bucket_folder
from ..run.files import said
from ..run.folder import CHECKPOINTS, OUTCOME, claimed
from ..run.meta import check_meta, write_meta
from ..run.origin import Origin, on_disk
from ..run.outcome import Outcome, RunFailed
from ..run.output import Output
from ..schedule_free import schedules_in_words
from ..sharding import build_mesh
from ..train import train
from .entrants import Entrant, line_up
from .hardware import hardware_table
from .race_config import (
    RaceConfig,
    buildable,
    check_bucket,
    check_data,
    check_origins,
    check_past,
    origins_of,
    out_folder,
)
from .report import write_report
from .summary import ranked, summary_table
from .threshold import in_words


def race(config: RaceConfig, console: Console | None = None) -> list[Outcome]:
    """Runs a race and writes its report.

    Everything is checked before anything is written, the report included. A run whose loss stops being
    finite is reported as diverged and the others go on; an interruption (Ctrl-C) leaves the runs
    finished so far in the report and is raised again.

    Args:
      config: what to run.
      console: where to print; by default the terminal.

    Returns:
      The outcomes, in the order of the line-up.

    Raises:
      ValueError: for any part of the configuration that cannot be run.
      RunFailed: if it cannot go on, for a full disk or a text that changes; what had ended is kept.
    """
    start(config.launch)
    console = console or Console(file=cast(TextIO, Output()), quiet=not is_first())
    with unanimous():
        check_local(config)
        check_bucket(config)
        if config.tensorboard is not None:
            tensorboard.check()
        entrants = tuple(
            dataclasses.replace(entrant, repeat=repeat)
            for entrant in line_up(config.optimizers, config.learning_rates, config.set)
            for repeat in range(config.seeds)
        )
        given = config.run.model.vocabulary
        corpus = corpus_of(config.run, given if given != 256 else None).for_races()
        model = dataclasses.replace(config.run.model, vocabulary=corpus.vocabulary)
        run = dataclasses.replace(config.run, model=model)
        mesh = build_mesh(config.launch.mesh)
        transformations = buildable(run, entrants, corpus, mesh)
    identity = _identity(config, entrants, corpus)
    for what in ("text", "configuration", "optimizers"):
        check_same(what, _digest(identity[what]))
    with contextlib.ExitStack() as stack:
        outcomes = [
            Outcome(
                entrant.name,
                entrant.learning_rate,
                entrant.repeat,
                trials=entrant.trials,
                hyperparameters=json.loads(entrant.optimizer.to_json())["hyperparameters"],
            )
            for entrant in entrants
        ]
        ended = [False for _ in entrants]
        out, bucket, asked = Path(), None, config.out
        with unanimous():
            origins = origins_of(config, entrants, asked)
        with unanimous():
            if asked and (url := url_of(asked)) and is_first():
                flags = {"overwrite": config.overwrite, "resume": config.resume}
                bucket = stack.enter_context(bucket_folder(url, **flags))
                config = dataclasses.replace(config, out=bucket.folder)
        store = asked if asked and orbax_writes(asked) else config.out
        needed = _needed(origins, entrants, config.out, store) if config.resume else origins
        with unanimous():
            needed = [stack.enter_context(on_disk(origin)) for origin in needed]
        check_origins(needed, entrants, outcomes, run, corpus)
        origins = [found or origin for found, origin in zip(needed, origins, strict=True)]
        with unanimous():
            if is_first():
                out = out_folder(config)
                check_data(config, out)
                if config.resume:
                    check_past(config, entrants, run, out)
                flags = {"overwrite": config.overwrite, "resume": config.resume}
                stack.enter_context(claimed(out, identity, **flags))
                try:
                    if config.resume:
                        ended = [
                            check_meta(out / entrant.label, entrant.adapted(run), entrant, corpus)
                            and outcome.load(out / entrant.label, entrant.adapted(run))
                            for entrant, outcome in zip(entrants, outcomes, strict=True)
                        ]
                    write_report(out, outcomes, run, corpus)
                except OSError as error:
                    raise ValueError(f"{said(error)}; fix that or give another --out.") from error
                if bucket:
                    bucket.copy()
        out = Path(from_first(str(out.absolute())))
        store = store if store and orbax_writes(store) else out
        ended = json.loads(from_first(json.dumps(ended)))
        target = config.target_loss
        shown, copy = (bucket.url, bucket.try_to_copy) if bucket else (str(out), lambda: None)
        lines = [f"text: {corpus.description}", f"results: {shown}"]
        followed = schedules_in_words(run, [entrant.name for entrant in entrants])
        if followed != run.schedule_name:  # some optimizers have their own
            lines.append(f"schedule: {followed} (another with --schedule)")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        stack.enter_context(
            interrupts.last_words(lambda: _end(console, outcomes, run, shown, target, bucket))
        )
        try:
            with _progress(console) as progress:
                field = zip(entrants, transformations, outcomes, ended, origins, strict=True)
                for entrant, tx, outcome, has_ended, origin in field:
                    if has_ended:
                        continue
                    interrupts.check()
                    with _events(config, entrant, out) as (write, copy_events):

                        def copies(copy_events: Callable[[], None] = copy_events) -> None:
                            copy_events()
                            copy()

                        label = entrant.label
                        paths = RunPaths(out / label, store / label / CHECKPOINTS, origin)
                        _run_one(
                            entrant.adapted(run),
                            entrant,
                            tx,
                            corpus,
                            outcome,
                            paths,
                            Hooks(on_record=write, on_checkpoint=copies),
                            mesh,
                            progress,
                        )
                    if is_first():
                        outcome.save(out / entrant.label)
                        if outcome is not outcomes[-1]:
                            write_report(out, outcomes, run, corpus)
                            copy()
        except OSError as error:
            raise RunFailed(
                f"{said(error)}. Runs that had ended are kept in {shown}; fix that and repeat the "
                "command with --resume."
            ) from error
        finally:
            if is_first():
                with contextlib.suppress(OSError):  # a full disk has been reported already
                    write_report(out, outcomes, run, corpus)
                _tell(console, outcomes, run, shown, target)
        interrupts.check()
    return outcomes


def _needed(
    origins: list[Origin | None],
    entrants: tuple[Entrant, ...],
    out: Path | None,
    store: Path | None,
) -> list[Origin | None]:
    """Of a resumed race the origins of runs that have neither ended nor a checkpoint of their own."""
    with unanimous():
        labels = [entrant.label for entrant in entrants] if out and store and is_first() else []
        begun = [
            (out / label / OUTCOME).exists() or bool(steps_of(store / label / CHECKPOINTS))
            for label in labels
            if out and store
        ]
    begun = json.loads(from_first(json.dumps(begun)))
    pairs = itertools.zip_longest(origins, begun)
    return [None if has_begun else origin for origin, has_begun in pairs]


def _end(
    console: Console,
    outcomes: list[Outcome],
    run: RunConfig,
    out: str,
    target: float,
    bucket: Bucket | None,
) -> None:
    """What there is time for when the process ends without having come to a check."""
    _tell(console, outcomes, run, out, target)
    if bucket:
        bucket.release()


def _tell(
    console: Console, outcomes: list[Outcome], run: RunConfig, out: str, target: float
) -> None:
    if is_first():
        console.show_cursor()
        console.print(summary_table(outcomes, run))
        console.print(hardware_table(ranked(outcomes), run))
        for line in in_words(outcomes, target) if target else ():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        line = f"report: {out}/report.html"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _identity(config: RaceConfig, entrants: tuple[Entrant, ...], corpus: Corpus) -> dict[str, Any]:
    """The settings that decide the results; a race is resumed only if all of them are the same."""
    return {
        "configuration": config.asked(),
        "text": corpus.fingerprint,
        "optimizers": {
            entrant.label: {
                **json.loads(entrant.optimizer.to_json()),
                "learning_rate": entrant.learning_rate,
                "weight_decay": entrant.weight_decay,
                "warmup": entrant.warmup,
            }
            for entrant in entrants
        },
    }


def _run_one(
    run: RunConfig,
    entrant: Entrant,
    tx: optax.GradientTransformation,
    corpus: Corpus,
    outcome: Outcome,
    paths: RunPaths,
    hooks: Hooks,
    mesh: Mesh,
    progress: Progress,
) -> None:
    task = progress.add_task(
        entrant.label, total=run.updates, loss="compiling", speed="", heldout=""
    )

    def show(record: dict[str, float]) -> None:
        hooks.on_record(record)
        if "heldout_loss" in record:
            progress.update(task, heldout=f"held-out {record['heldout_loss']:.3f}")
            return
        done = record["step"] + 1
        speed = f"{outcome.tokens(done, run) / max(record['seconds'], 1e-9):,.0f} tokens/s"
        progress.update(task, completed=done, loss=f"loss {record['loss']:.3f}", speed=speed)

    def begin() -> None:
        if is_first():
            step = int(outcome.steps[-1]["step"]) + 1 if outcome.steps else 0
            write_meta(paths.folder, run, entrant, corpus, mesh, step, paths.origin)

    if is_first():
        paths.folder.mkdir(exist_ok=True)
    shown = dataclasses.replace(hooks, on_start=begin, on_record=show)
    train(run, tx, corpus, outcome, paths, shown, mesh)
    for line in outcome.samples:
        progress.console.print(f"{entrant.label}: {line}", highlight=False, markup=False)
    if outcome.status == "diverged":
        progress.update(task, loss="[red]diverged[/red]")


def _events(config: RaceConfig, entrant: Entrant, out: Path) -> Any:
    """What writes event files and copies them, where they are requested."""
    if config.tensorboard is None or not is_first():
        return contextlib.nullcontext((lambda record: None, lambda: None))
    return tensorboard.events(config.tensorboard / out.name / entrant.label)


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
