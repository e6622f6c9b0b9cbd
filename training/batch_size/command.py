"""The command `python -m ravine batch-size`: one run, branches at several batch sizes, an answer."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from ..data.corpus import Corpus, load_corpus
from ..run import interrupts
from ..run.files import Lines, read_lines, write_json
from ..step import TrainState
from .branches import best_steps, steps_to
from .config import BatchSizeConfig
from .fit import CriticalBatch, fit_critical_batch
from .picture import draw
from .trainer import Trainer


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
