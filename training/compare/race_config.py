"""The configuration of a race, and the checks made before anything is written."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from ..config import RunConfig
from ..config_file import read_config
from ..data.batches import heldout_batches, train_batches
from ..data.corpus import Corpus
from ..distributed import LaunchConfig, is_first
from ..identity import FREE, LATER, to_json
from ..run.folder import RACE, is_race
from ..sharding import batch_sharding
from ..step import place
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
    out: Path | None = None
    """Folder for the results; by default runs/race-DATE-TIME."""
    overwrite: bool = False
    """Replace the results of an earlier race in the folder; files that no race has written are never
    removed."""
    resume: bool = False
    """Continue the interrupted race in the folder: finished runs are kept; the one that was
    interrupted continues from its newest checkpoint, or starts again if it has none."""
    tensorboard: Path | None = dataclasses.field(default=None, metadata=FREE)
    """Folder for TensorBoard event files, one folder inside for every run; needs tensorboardX."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)

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
    if run.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention cudnn needs an NVIDIA GPU, not {jax.default_backend()}; take xla or plain."
        )
    sizes: Any = {"batch_size": run.batch_size, "context": run.model.context}
    train_batches(corpus, seed=run.seed, **sizes)
    heldout_batches(corpus, batches=run.eval_batches, **sizes)
    rows = batch_sharding(mesh, run.batch_size)
    parts = run.batch_size // rows.shard_shape((run.batch_size,))[0]
    cut = max(run.micro_batches, 2 if run.noise_scale_every else 1)
    if run.batch_size % (cut * parts):
        raise ValueError(
            f"batch_size {run.batch_size} does not divide by {cut} micro_batches on {parts} part(s) of "
            f"the mesh; make it a multiple of {cut * parts}."
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
        return config.out
    if config.resume:
        raise ValueError("--resume needs the --out of an earlier race.")
    return Path("runs") / f"race-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S')}"


def check_data(config: RaceConfig, out: Path) -> None:
    """Refuses a text in the folder that is to be cleared."""
    for path in config.run.data:
        if config.overwrite and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{path} lies in {out}, which --overwrite clears; give another --out.")


def check_past(
    config: RaceConfig, entrants: tuple[Entrant, ...], run: RunConfig, out: Path
) -> None:
    """A resumed race may become longer, not shorter, and its past keeps its learning rates."""
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
        then, now = (
            np.asarray(
                entrant.adapted(r).learning_rate(entrant.learning_rate)(jnp.arange(before.steps))
            )
            for r in (before, run)
        )
        if (then != now).any():
            first = int((then != now).argmax())
            raise ValueError(
                f"{another} ({before.steps} steps there and {run.steps} here: learning rates of "
                f"{entrant.name} would be others from step {first} on); a race that may become longer "
                "needs --schedule constant and --warmup-steps, or --schedule-steps for its full length."
            )
