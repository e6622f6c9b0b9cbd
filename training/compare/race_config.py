"""The configuration of a race, and the checks made before anything is written."""

import dataclasses
import datetime
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from ..batch_schedule import CONSTANT, rule_of
from ..checkpoint import METADATA, Checkpoints
from ..config import RunConfig, check_repeats
from ..config_file import read_config
from ..data.batches import heldout_batches, train_batches
from ..data.buckets import orbax_writes, url_of
from ..data.corpus import Corpus
from ..distributed import LaunchConfig, is_first
from ..identity import BUCKET, FREE, LATER, to_json
from ..model import check_attention
from ..placed import place
from ..run.files import read_json
from ..run.folder import META, RACE, is_race
from ..run.origin import Origin
from ..run.outcome import Outcome
from ..run.past import identity_of, past_of, rates_of
from ..sharding import batch_sharding
from .entrants import Entrant
from .report import try_report


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Train several optimizers on the same model and text, and compare them."""

    optimizers: str = "adamw,muon,shampoo,soap,lion,sgd"
    """Names, separated by commas."""
    learning_rates: str = ""
    """Peak learning rates that replace the tuned ones: name=value, separated by commas."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = dataclasses.field(default=(), metadata=LATER)
    """Hyperparameters that replace an optimizer's own: shampoo.refresh.every=20, muon.b1=0.9; once for
    each."""
    seeds: int = 1
    """Runs of every optimizer, with the seed of the run and those after it; with several, means and
    standard errors are reported, and which differences are noise."""
    target_loss: float = dataclasses.field(default=0.0, metadata=FREE)
    """Held-out loss whose first step is printed for each optimizer, by the rule of
    ravine.training.compare.threshold over its seeds; no run stops there. 0 for none."""
    out: Path | None = dataclasses.field(default=None, metadata=BUCKET)
    """Folder for the results, gs:// and s3:// too; by default runs/race-DATE-TIME."""
    overwrite: bool = False
    """Replace the results of an earlier race in the folder; files that no race has written are never
    removed."""
    resume: bool = False
    """Continue the interrupted race in the folder: finished runs are kept; the one that was
    interrupted continues from its newest checkpoint, or starts again if it has none."""
    branch_from: str = dataclasses.field(default="", metadata=LATER)
    """FOLDER@STEP: every run starts from that checkpoint of its optimizer in the folder of another
    race, gs:// and s3:// too, as for a cooldown; what would change its past is refused, and it is left
    as it is."""
    tensorboard: Path | None = dataclasses.field(default=None, metadata={**FREE, **BUCKET})
    """Folder for TensorBoard event files, gs:// and s3:// too, one folder inside for every run; needs
    tensorboardX."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check_repeats(seeds=self.seeds)
        if not (math.isfinite(self.target_loss) and self.target_loss >= 0):
            raise ValueError(
                f"target_loss must be finite and not negative, got {self.target_loss}."
            )

    def asked(self) -> dict[str, Any]:
        """The settings that decide the results, as JSON values."""
        kept = dataclasses.replace(
            self, out=None, overwrite=False, resume=False, launch=LaunchConfig()
        )
        return to_json(kept)


def buildable(
    run: RunConfig, entrants: tuple[Entrant, ...], corpus: Corpus, mesh: Mesh
) -> list[optax.GradientTransformation]:
    """Builds all that can refuse its configuration, without running anything."""
    check_attention(run.model)
    sizes: Any = {"batch_size": run.batch_size, "context": run.model.context}
    train_batches(corpus, seed=run.seed, order=run.order, **sizes)
    heldout_batches(corpus, batches=run.eval_batches, **sizes)
    rows = batch_sharding(mesh, run.batch_size)
    parts = run.batch_size // rows.shard_shape((run.batch_size,))[0]
    cut = max(run.micro_batches, 2 if run.noise_scale_every else 1)
    if run.batch_size % (cut * parts) and run.batches == CONSTANT:
        raise ValueError(
            f"batch_size {run.batch_size} does not divide by {cut} micro_batches on {parts} part(s) of "
            f"the mesh; make it a multiple of {cut * parts}."
        )
    for size in {size for entrant in entrants for size in entrant.adapted(run).sizes_used}:
        count = run.micro_batches_of(size, parts)
        if run.noise_scale_every and count == 1 and size % (2 * parts):
            raise ValueError(
                f"noise_scale_every cuts a batch of {size} of the schedule in two on each of {parts} "
                "part(s) of the mesh; make every batch a multiple of twice as many."
            )
    built = [entrant.build(run) for entrant in entrants]
    for tx in built:
        place(run.model, tx, mesh)
    if is_first():
        try_report(run, corpus)
    return built


def out_folder(config: RaceConfig) -> Path:
    """Where results go."""
    if config.out is not None:
        try:
            str(config.out.absolute()).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{config.out} is not UTF-8, which Orbax needs; give another --out."
            ) from None
        # Else what is before a .. would be made, and then left.
        return Path(os.path.realpath(config.out)) if ".." in config.out.parts else config.out
    if config.resume:
        raise ValueError("--resume needs the --out of an earlier race.")
    return Path("runs") / f"race-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"


def check_bucket(config: RaceConfig) -> None:
    """Refuses a bucket where several processes would have checkpoints on disks of their own."""
    if jax.process_count() == 1:
        return
    named = {"--out": config.out, "--branch-from": Path(config.branch_from)}
    for flag, path in named.items():
        if path and (url := url_of(path)) and not orbax_writes(path):
            raise ValueError(
                f"{flag} {url}: several processes can write and read checkpoints in gs:// only, as "
                "Orbax does; give a folder that all see, such as one where the bucket is mounted."
            )


def check_data(config: RaceConfig, out: Path) -> None:
    """Refuses a text in the folder that is to be cleared."""
    for path in (*config.run.data, *config.run.heldout_data):
        if config.overwrite and not url_of(path) and _lies_in(path, out):
            raise ValueError(f"{path} lies in {out}, which --overwrite clears; give another --out.")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder's or inside; one that goes in circles is refused where it is opened."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def origins_of(
    config: RaceConfig, entrants: tuple[Entrant, ...], out: Path | None
) -> list[Origin | None]:
    """The checkpoint that each run branches off.

    Raises:
      ValueError: for words that do not name one, or a folder that the race itself writes to.
    """
    if not config.branch_from:
        return [None for _ in entrants]
    folder, at, step = config.branch_from.rpartition("@")
    if not (at and folder.strip() and step.isdecimal()):
        raise ValueError(
            f"branch_from takes FOLDER@STEP, the folder of a race and a step that has a checkpoint; got "
            f"{config.branch_from!r}."
        )
    race = Path(folder)
    if out is not None and _lies_in(race, out):
        raise ValueError(f"{race} lies in {out}, which this race writes to; give another --out.")
    return [Origin(race / entrant.label, int(step)) for entrant in entrants]


def check_origins(
    origins: list[Origin | None],
    entrants: tuple[Entrant, ...],
    outcomes: list[Outcome],
    run: RunConfig,
    corpus: Corpus,
) -> None:
    """Refuses checkpoints that are not there, or of another past."""
    for origin, entrant, outcome in zip(origins, entrants, outcomes, strict=True):
        if origin is None:
            continue
        here = entrant.adapted(run)
        if here.updates <= origin.step:
            raise ValueError(
                f"a branch from step {origin.step} needs more than the {here.updates} steps of this "
                "race; raise --steps."
            )
        past = past_of(here, rates_of(here, outcome))
        identity = identity_of(here, outcome, corpus)
        Checkpoints(Path(), identity, past, origin=origin).check_origin(only={METADATA})


def check_past(
    config: RaceConfig, entrants: tuple[Entrant, ...], run: RunConfig, out: Path
) -> None:
    """A resumed race may become longer, not shorter, and its past keeps its learning rates.

    Schedules are compared as the runs' ``meta.json`` says: until a default could be told from a choice,
    ``race.json`` named the cosine for optimizers that followed a schedule of their own.
    """
    if not is_race(out):
        return  # `claimed` says so
    before = read_config(out / RACE, RaceConfig()).run
    before = dataclasses.replace(before, model=run.model)
    another = f"{out} holds a race of another configuration"
    if run.steps < before.steps:
        raise ValueError(
            f"{another} ({before.steps} steps there and {run.steps} here); steps may only grow."
        )
    for entrant in entrants:
        then_run = entrant.adapted(_with_told_schedule(before, out / entrant.label))
        now_run = entrant.adapted(run)
        past = then_run.updates
        if then_run.batch_sizes.phases(past) != now_run.batch_sizes.phases(past):
            raise ValueError(
                f"{another} (batch sizes of {entrant.name} would be others); a batch schedule may "
                "change only what is still to come."
            )
        then, now = (
            np.asarray(
                r.learning_rate(entrant.learning_rate, rule_of(entrant.name))(jnp.arange(past))
            )
            for r in (then_run, now_run)
        )
        if (then != now).any():
            first = int((then != now).argmax())
            if then_run.schedule != now_run.schedule:
                raise ValueError(
                    f"{another} ({entrant.name} would follow {now_run.schedule}, and followed "
                    f"{then_run.schedule} there); give --schedule {then_run.schedule}, or another --out."
                )
            raise ValueError(
                f"{another} ({before.steps} steps there and {run.steps} here: learning rates of "
                f"{entrant.name} would be others from step {first} on); a race that may become longer "
                "needs --schedule constant and --warmup-steps, or --schedule-steps for its full length."
            )


def _with_told_schedule(run: RunConfig, folder: Path) -> RunConfig:
    """A race's configuration with the schedule that one of its runs followed, if it has begun."""
    try:
        told = read_json(folder / META, "")["run"]["schedule"]
        return dataclasses.replace(run, schedule=told)
    except (OSError, ValueError, KeyError, TypeError):  # damage is for `check_meta` to report
        return run
