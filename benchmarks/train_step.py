"""A train step of the trainer's model with AdamW against the same in PyTorch, for docs/benchmarks.md.

    python benchmarks train_step                  # two minutes, plus installation the first time
    python benchmarks train_step --peers FOLDER   # where the peers' environment is or will be
    python benchmarks train_step --without-torch --turns 1 --steps 1  # only ours: a trial

Both start from the same weights and get the same batches; the losses of the first step must agree. Ours
is the step that the trainer compiles: clipping, AdamW as tuned, the metrics of a step. PyTorch's
(`peers/torch_model.py`) clips, uses the fused AdamW at a constant rate, and runs eagerly, then under
`torch.compile`. A turn is a few steps, dispatched one after the other with one wait at the end. Turns
alternate, A B A B; the table has medians, with the smallest and largest in parentheses.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from measure import compared, heading, in_turn, spread, write
from peers.environment import FOLDER, interpreter
from peers.talk import Peer
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.sharding import batch_sharding, build_mesh
from ravine.training.step import make_train_step

BAR = 0.9
WAYS = ["eager", "compiled"]
MODELS = {"the race's": RunConfig().model, "`ModelConfig()`": ModelConfig()}
(ADAMW,) = line_up("adamw")


class Ours:
    """The trainer's step on one device, cycling through the batches."""

    def __init__(self, model: ModelConfig, batch_size: int = 16):
        self.run = ADAMW.adapted(RunConfig(model=model, batch_size=batch_size))
        self._mesh = build_mesh()
        shape = (8, self.run.batch_size, model.context + 1)
        rng = np.random.default_rng(0)
        self.batches = rng.integers(0, model.vocabulary, shape, dtype=np.int32)
        with jax.set_mesh(self._mesh):
            placed = place(model, ADAMW.build(self.run), self._mesh)
            self._state, shardings = placed.init(self.run.seed), placed.shardings
            step = make_train_step(
                placed.graphdef, placed.tx, attention_logits=False, fused=self.run.fused
            )
            self._rows = batch_sharding(self._mesh, self.run.batch_size)
            example = jax.ShapeDtypeStruct(shape[1:], np.int32, sharding=self._rows)
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))
            self._compiled = jitted.lower(self._state, example).compile()
        self._at = 0

    def weights(self) -> dict[str, np.ndarray]:
        """The current values, by path."""
        flat = traverse_util.flatten_dict(self._state.params, sep="/")
        return {name: np.array(value) for name, value in flat.items()}

    def step(self) -> dict[str, jax.Array]:
        batch = self.batches[self._at % len(self.batches)]
        self._at += 1
        placed = jax.make_array_from_process_local_data(self._rows, batch, batch.shape)
        self._state, metrics = self._compiled(self._state, placed)
        return metrics

    def mean(self, steps: int) -> float:
        """Seconds per step, over this many steps."""
        started = time.perf_counter()
        for _ in range(steps):
            metrics = self.step()
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - started) / steps


def asked_of(peer: Peer, ours: Ours, file: Path, compiled: bool, device: str) -> float:
    """Makes the peer build the model from a file; returns the loss of its first step."""
    run, config = ours.run, ADAMW.optimizer
    return peer.ask(
        "training",
        file=str(file),
        compiled=compiled,
        device=device,
        dtype=run.model.dtype,
        model={
            "heads": run.model.heads,
            "context": run.model.context,
            "base": run.model.rope_base,
        },
        optimizer={
            "lr": ADAMW.learning_rate,
            "betas": [config.value("b1"), config.value("b2")],
            "eps": config.value("eps"),
            "weight_decay": (run.weight_decay or 0.0) / ADAMW.learning_rate,
        },
        clip_norm=run.clip_norm,
    )


def rows(
    name: str,
    model: ModelConfig,
    peer: Peer | None,
    ways: list[str],
    turns: int,
    steps: int,
    batch_size: int = 16,
    device: str = "cpu",
) -> Iterator[str]:
    """Lines of the table, one for each way of running PyTorch, on its device."""
    ours = Ours(model, batch_size)
    weights = ours.weights()
    size = sum(x.size for x in weights.values()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.npz"
        np.savez(file, batches=ours.batches, **weights)
        loss = float(ours.step()["loss"])
        ours.mean(steps)
        if peer is None:
            times = [1e3 * ours.mean(steps) for _ in range(turns)]
            yield f"| {name}, {size:.2f} M | none | {spread(times)} | | | | {turns} × {steps} |"
            return
        for way in ways:
            other = asked_of(peer, ours, file, way == "compiled", device)
            yield _row(f"{name}, {size:.2f} M", peer, ours, (loss, other), way, turns, steps)


def _row(
    name: str,
    peer: Peer,
    ours: Ours,
    losses: tuple[float, float],
    way: str,
    turns: int,
    steps: int,
) -> str:
    loss, other = losses
    # In bfloat16 an activation is off by 2^-9 of itself, and not the same one in both.
    if abs(other - loss) > (1e-3 if ours.run.model.dtype == "float32" else 2**-7) * loss:
        raise RuntimeError(f"the models differ: losses of the first step {loss} and {other}.")
    theirs: Any = lambda: peer.ask("mean", steps=steps)
    theirs()
    times = in_turn(lambda: ours.mean(steps), theirs, turns)
    return f"| {name} | {way} | {compared(times, BAR, steps)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=FOLDER, help="folder of their environment")
    parser.add_argument("--without-torch", action="store_true", help="ours only; writes nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="per turn")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of PyTorch")
    parser.add_argument("--layers", type=int, help="another depth; writes nothing")
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    peer = None if asked.without_torch else Peer(interpreter(asked.peers), asked.threads)
    versions = f" Peer: {peer.ask('versions')}, {asked.threads} threads." if peer else ""
    lines = [
        heading("python benchmarks train_step")[0] + versions,
        "",
        "| model | PyTorch | ours, ms | PyTorch's, ms | ratio | bar | turns × steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        if asked.layers:
            model = dataclasses.replace(model, layers=asked.layers)
        for row in rows(name, model, peer, asked.ways, asked.turns, asked.steps):
            lines.append(row)
            print(row, flush=True)
            if not (asked.no_write or asked.without_torch or asked.layers):
                write("train_step", lines)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
