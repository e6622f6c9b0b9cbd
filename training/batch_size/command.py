"""The command `python -m ravine batch-size`: one run, branches at several batch sizes, an answer."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from ...optimizers.roles import mask_by_role
from ...stability import clip_by_global_norm, noise_scale, squared_norms, with_noise_scale
from ..compare.entrants import DECAYED, line_up
from ..config import check_learning_rate
from ..data.batches import heldout_batches, train_batches
from ..data.corpus import Corpus, load_corpus
from ..gradients import micro_batch_value_and_grad
from ..model import ModelConfig
from ..run import interrupts
from ..run.files import Lines, read_lines, write_json
from ..step import TrainState, init_params, init_state, make_loss, make_train_step, mean_loss
from .branches import best_steps, check_branches, steps_to
from .fit import CriticalBatch, fit_critical_batch
from .picture import draw
from .rescale import Rescaled, rescaled

MICRO_BATCHES = 4
NOISE_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class BatchSizeConfig:
    """Measures the critical batch size of a model at one point of its training.

    One run trains at the base batch size. From its state, branches train at each batch size, with the
    learning rate, decay rates, epsilon and weight decay that the rules for this batch size give, times
    each rate factor, until they reach the loss that the run itself reaches some updates later. The
    steps they take are fitted by S_min (1 + B_crit / B).
    """

    optimizer: str = "adamw"
    """A registered optimizer."""
    learning_rate: float = 0.0
    """Peak of the run at the base batch size; 0 takes the tuned one."""
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Sequences per step of the branches; three or more."""
    rate_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors of the rescaled learning rate; for each batch size the best one counts."""
    seeds: int = 2
    """Branches per batch size and factor, each with data of its own."""
    batch_size: int = 16
    """Base: sequences per step of the run the branches leave."""
    start_steps: int = 100
    """Updates of the run before the branches leave it; the first tenth warms up."""
    target_steps: int = 100
    """Updates after which the run itself has reached the loss the branches are to reach."""
    most: float = 3.0
    """A branch gives up after this many times the steps that the same tokens, or the same steps, would
    take, whichever is more."""
    evaluations: int = 20
    """Evaluations over the steps that the same tokens would take."""
    eval_batches: int = 8
    """Held-out batches of the base size."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 switches clipping off."""
    weight_decay: float = 3e-4
    """Share of every matrix that a step of the base size removes."""
    seed: int = 0
    """Of the initial parameters and of the data of the run."""
    data: tuple[Path, ...] = ()
    """Text files or a uint16 .bin; by default this Python's own standard library."""
    out: Path = Path("runs/batch-size")
    """Folder for branches.jsonl, answer.json and batch_size.png; branches that are there are kept."""
    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(width=64, layers=2, unroll=2)
    )

    def __post_init__(self) -> None:
        check_branches(self.batch_sizes, self.rate_factors, range(self.seeds))
        for name in ("batch_size", "start_steps", "target_steps", "evaluations", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("clip_norm", "weight_decay", "learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if not (math.isfinite(self.most) and self.most >= 1):
            raise ValueError(f"most must be finite and at least 1, got {self.most}.")
        if self.batch_size % MICRO_BATCHES:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of {MICRO_BATCHES}, the micro-batches "
                "that the noise scale is measured from."
            )


class Trainer:
    """Steps of any batch size and learning rate on one kind of state."""

    def __init__(self, config: BatchSizeConfig, corpus: Corpus):
        (entrant,) = (
            line_up(config.optimizer, f"{config.optimizer}={config.learning_rate}")
            if (config.learning_rate)
            else line_up(config.optimizer)
        )
        self.config, self.corpus = config, corpus
        self.optimizer, self.rate = entrant.optimizer, entrant.learning_rate
        check_learning_rate(config.optimizer, self.rate)
        self.graphdef, self.start = init_params(config.model, config.seed)
        self.heldout = jnp.asarray(
            heldout_batches(
                corpus,
                batch_size=config.batch_size,
                context=config.model.context,
                batches=config.eval_batches,
            )
        )

    def at(self, batch_size: int) -> Rescaled:
        """The optimizer at a batch size."""
        ratio = batch_size / self.config.batch_size
        decay = self.config.weight_decay / self.rate
        return rescaled(self.optimizer, self.rate, decay, ratio)

    def transformation(self, batch_size: int, rate: Any) -> optax.GradientTransformation:
        """The chain with a learning rate, which may be traced."""
        here = self.at(batch_size)
        overrides: dict[str, Any] = {}
        if here.optimizer.accepts("weight_decay"):
            overrides = {
                "weight_decay": here.weight_decay,
                "weight_decay_mask": mask_by_role(DECAYED),
            }
        tx = here.optimizer.build(rate, **overrides)
        clip = self.config.clip_norm
        return optax.chain(clip_by_global_norm(clip), tx) if clip else tx

    @functools.cache  # noqa: B019 - one trainer a command
    def step(self, batch_size: int) -> Any:
        """``step(state, batch, rate)``, compiled once per batch size."""

        def step(state: TrainState, batch: Any, rate: jax.Array) -> Any:
            tx = self.transformation(batch_size, rate)
            return make_train_step(self.graphdef, tx)(state, batch)

        return jax.jit(step, donate_argnums=0)

    def fresh(self) -> TrainState:
        """The state before the first step."""
        tx = self.transformation(self.config.batch_size, self.rate)
        return jax.jit(lambda params: init_state(params, tx))(self.start)

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Training data in an order of its own."""
        return train_batches(
            self.corpus, batch_size=batch_size, context=self.config.model.context, seed=seed
        )

    def loss(self, state: TrainState) -> float:
        """Held-out loss."""
        return float(mean_loss(self.graphdef, state.params, self.heldout))

    def noise(self, state: TrainState, seed: int) -> float:
        """The noise scale at these parameters, in tokens."""
        context = self.config.model.context
        measure = micro_batch_value_and_grad(
            make_loss(self.graphdef),
            MICRO_BATCHES,
            tokens=lambda batch: batch.shape[0] * context,
            measure=squared_norms,
        )
        # Every batch counts alike, as near as matters over so few.
        tx = with_noise_scale(optax.set_to_zero(), decay=0.999)

        @jax.jit
        def add(found: Any, params: Any, batch: Any) -> Any:
            _, grads, micro = measure(params, batch)
            return tx.update(grads, found, params, micro_batches=micro)[1]

        found, batches = tx.init(state.params), self.batches(self.config.batch_size, seed)
        for _ in range(NOISE_BATCHES):
            found = add(found, state.params, next(batches))
        return float(noise_scale(found)["noise_scale"])


def measure_batch_size(config: BatchSizeConfig, console: Console) -> CriticalBatch:
    """Runs the branches that are missing, fits, prints and draws the answer.

    Raises:
      ValueError: for a configuration or data that cannot be used, a folder with branches of another
        configuration, or too few batch sizes that reached the loss.
    """
    corpus = load_corpus(config.data, vocabulary=config.model.vocabulary)
    trainer = Trainer(config, corpus)
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / "branches.jsonl"
    identity = _identity(config, corpus)
    kept = _kept(file, identity)
    tokens = config.model.context

    rate = jnp.float32(trainer.rate)
    state, batches = trainer.fresh(), trainer.batches(config.batch_size, config.seed)
    warmup = max(1, config.start_steps // 10)
    for done in range(config.start_steps):
        interrupts.check()
        state, _ = trainer.step(config.batch_size)(
            state, next(batches), rate * min(1.0, (done + 1) / warmup)
        )
    noise = trainer.noise(state, config.seed + 1)
    branch_point = jax.tree.map(jnp.copy, state)
    before = trainer.loss(state)
    for _ in range(config.target_steps):
        interrupts.check()
        state, _ = trainer.step(config.batch_size)(state, next(batches), rate)
    target = trainer.loss(state)
    if not target < before:
        raise ValueError(
            f"the run does not improve after the branch point ({before:.4f} to {target:.4f} nats); give "
            "more --target-steps or a lower --learning-rate."
        )
    console.print(
        f"branches leave {config.optimizer} at {before:.3f} nats (update {config.start_steps}) and end "
        f"at {target:.3f} nats; noise scale there {noise:,.0f} tokens"
    )

    lines = Lines(file)

    def run(batch_size: int, factor: float, seed: int) -> float:
        key = (batch_size, factor, seed)
        if key not in kept:
            steps, losses = _branch(trainer, branch_point, batch_size, factor, seed, target)
            row = {"batch_size": batch_size, "factor": factor, "seed": seed, "target": target}
            kept[key] = row | {"steps": steps, "losses": losses, "identity": identity}
            lines.write(kept[key])
        return steps_to(target, kept[key]["steps"], kept[key]["losses"])

    try:
        steps, factors = best_steps(
            run, config.batch_sizes, config.rate_factors, range(1, config.seeds + 1)
        )
    finally:
        lines.close()
    found = fit_critical_batch({batch * tokens: runs for batch, runs in steps.items()})
    console.print(_table(trainer, steps, factors, found))
    console.print(found.sentence())
    for warning in (_outside(steps, found, tokens), _edge(config, factors)):
        if warning:
            console.print(warning)
    answer = {
        "critical_batch_tokens": found.batch,
        "interval_90": [found.low, found.high],
        "fewest_steps": found.steps,
        "noise_scale_tokens": noise,
        "steps": {str(batch * tokens): runs for batch, runs in steps.items()},
        "factors": {str(batch * tokens): factor for batch, factor in factors.items()},
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
    }
    write_json(config.out / "answer.json", answer)
    draw(config.out / "batch_size.png", {b * tokens: s for b, s in steps.items()}, found, noise)
    return found


def _branch(
    trainer: Trainer, start: TrainState, batch_size: int, factor: float, seed: int, target: float
) -> tuple[list[int], list[float]]:
    config = trainer.config
    same_tokens = config.target_steps * config.batch_size / batch_size
    most = math.ceil(config.most * max(same_tokens, config.target_steps))
    every = max(1, round(same_tokens / config.evaluations))
    rate = jnp.float32(trainer.at(batch_size).learning_rate * factor)
    state, batches = (
        jax.tree.map(jnp.copy, start),
        trainer.batches(batch_size, config.seed + 1000 + seed),
    )
    steps, losses = [0], [trainer.loss(state)]
    step = trainer.step(batch_size)
    for done in range(1, most + 1):
        interrupts.check()
        state, _ = step(state, next(batches), rate)
        if done % every == 0 or done == most:
            steps.append(done)
            losses.append(trainer.loss(state))
            if losses[-1] <= target or not math.isfinite(losses[-1]):
                break
    return steps, losses


def _identity(config: BatchSizeConfig, corpus: Corpus) -> str:
    """The settings that decide a branch, whatever other branches there are."""
    told = dataclasses.asdict(config)
    for name in ("batch_sizes", "rate_factors", "seeds", "out", "data"):
        del told[name]
    text = json.dumps([told, corpus.fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kept(file: Path, identity: str) -> dict[tuple[int, float, int], Any]:
    def take(row: dict[str, Any]) -> tuple[tuple[int, float, int], Any]:
        losses = [math.inf if loss is None else loss for loss in row["losses"]]
        key = (row["batch_size"], row["factor"], row["seed"])
        return key, row | {"losses": losses, "identity": row["identity"]}

    fix = "remove that line, and its branch is run again"
    kept = read_lines(file, take, fix) if file.exists() else []
    if any(row["identity"] != identity for _, row in kept):
        raise ValueError(
            f"{file} holds branches of another configuration or text; give another --out."
        )
    return dict(kept)


def _table(trainer: Trainer, steps: Any, factors: Any, found: CriticalBatch) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("tokens per step", "learning rate", "steps", "fit", "tokens"):
        table.add_column(column, justify="right")
    tokens = trainer.config.model.context
    for batch, runs in steps.items():
        rate = trainer.at(batch).learning_rate * factors[batch]
        mean = sum(runs) / len(runs)
        fit = found.steps_at(batch * tokens)
        reached = (
            [f"{mean:.0f}", f"{mean * batch * tokens:,.0f}"] if math.isfinite(mean) else ["-", "-"]
        )
        table.add_row(f"{batch * tokens:,}", f"{rate:.2g}", reached[0], f"{fit:.0f}", reached[1])
    return table


def _outside(steps: Any, found: CriticalBatch, tokens: int) -> str:
    """A warning where the answer lies outside of what was tried."""
    if min(steps) * tokens <= found.batch <= max(steps) * tokens:
        return ""
    tried = f"{min(steps) * tokens:,} to {max(steps) * tokens:,} tokens"
    return f"this lies outside of what was tried, {tried}: widen --batch-sizes to be sure of it"


def _edge(config: BatchSizeConfig, factors: dict[float, float]) -> str:
    """A warning where the best learning rate may lie outside of those tried."""
    ends = {min(config.rate_factors), max(config.rate_factors)}
    at = [f"{batch:g}" for batch, factor in factors.items() if factor in ends]
    if len(config.rate_factors) < 3 or not at:
        return ""
    return (
        f"at batch size {', '.join(at)} the best rate factor is the smallest or largest tried; widen "
        "--rate-factors to be sure"
    )
