"""Optimizers and train steps on a GPU, against its limits; writes its parts of docs/benchmarks.md.

    python benchmarks gpu                        # all parts, each meant to take under ten minutes
    python benchmarks gpu updates_124m guards    # some
    python benchmarks gpu --small --any-device   # a trial anywhere, in a minute; writes nothing
    python benchmarks gpu --profile FOLDER       # also a trace of three updates of each optimizer
    python benchmarks gpu --without-torch        # no peer in the train step

Parts: updates_124m and updates_1b3 (parameters in float32 and bfloat16), guards, steps. A part stops
before a row that would begin after its `--minutes`, and says which were left out; its table is written
after every row, so a run that is cut off leaves what it had.

Updates are dispatched one after the other, with donated buffers and one wait at the end, after a turn
that is not counted; figures are medians of turns. Limits are measured first: bytes per second of the
faster of a copy and an addition in place, and operations per second of bfloat16 products of square
matrices, at the fastest side. Gradients have the falling spectrum of real ones, as eigenvalue solvers
and roots take longer on it than on white noise.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from measure import write
from on_device import GUARDS, LARGE, OPTIMIZERS, SMALL, guarded, heading, limits, tree_of, updated
from peers.environment import FOLDER, interpreter
from peers.talk import Peer
from ravine.training.model import ModelConfig
from train_step import rows as steps_of

DTYPES = ("float32", "bfloat16")


class Clock:
    """Whether a part has time for another row."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> bool:
        return time.monotonic() < self._end


def updates(size: str, asked: argparse.Namespace) -> Iterator[str]:
    """A table of every optimizer on a tree, in both dtypes."""
    clock, found = Clock(asked.minutes), limits(asked.small)
    yield from found.lines()
    yield (
        "| parameters | optimizer | update, ms | slowest, ms | bytes, of the fastest copy "
        "| operations, of the fastest product | of Muon's time | bar |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for dtype in DTYPES:
        tree, muon = tree_of(_model(size, asked), dtype), None
        for name in OPTIMIZERS:
            if not clock.left():
                yield f"| {dtype} | {name} | not reached in {asked.minutes:g} minutes | | | | | |"
                continue
            row = updated(name, tree, asked.turns, asked.profile)
            if row is None:
                yield f"| {dtype} | {name} | does not fit into memory | | | | | |"
                continue
            muon = row.update if name == "muon" else muon
            yield f"| {dtype} | {row.line(found, muon)}"


def guards(asked: argparse.Namespace) -> Iterator[str]:
    """AdamW in guards and alone, in turn."""
    yield "| guard | guarded, ms | AdamW alone, ms | ratio | bar | turns × steps |"
    yield "|---|---|---|---|---|---|"
    tree = tree_of(_model("updates_124m", asked), "float32")
    for name in GUARDS:
        yield f"| {name} | {guarded(name, tree, asked.turns)}"


def steps(asked: argparse.Namespace) -> Iterator[str]:
    """The trainer's step with AdamW against PyTorch's, tokens a step in the first column."""
    yield "| model | PyTorch | ours, ms | PyTorch's, ms | ratio | bar | turns × steps |"
    yield "|---|---|---|---|---|---|---|"
    clock = Clock(asked.minutes)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    peer = None
    if not asked.without_torch:
        peer = Peer(interpreter(asked.peers, asked.wheels), 8)
    for name, (model, batch) in (SMALL if asked.small else LARGE)["steps"].items():
        if not clock.left():
            yield f"| {name} | not reached in {asked.minutes:g} minutes | | | | | |"
            continue
        ways = ["eager", "compiled"]
        yield from steps_of(
            name, model, peer, ways, asked.turns, 10, batch_size=batch, device=device
        )
    if peer:
        peer.close()


def _model(size: str, asked: argparse.Namespace) -> ModelConfig:
    return (SMALL if asked.small else LARGE)[size]


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "updates_124m": functools.partial(updates, "updates_124m"),
    "updates_1b3": functools.partial(updates, "updates_1b3"),
    "guards": guards,
    "steps": steps,
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="of a part")
    parser.add_argument("--turns", type=int, default=9, help="of which a figure is the median")
    parser.add_argument("--profile", type=Path, help="folder for traces")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="folder of their environment")
    parser.add_argument(
        "--wheels", type=Path, help="folder to install peers from, without a network"
    )
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--small", action="store_true", help="a trial; writes nothing")
    parser.add_argument("--any-device", action="store_true", help="without a GPU; writes nothing")
    asked = parser.parse_args(words)
    unknown = sorted(set(asked.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
    if jax.default_backend() != "gpu" and not asked.any_device:
        parser.error("JAX finds no GPU here; --any-device --small tries the command without one")
    for part in asked.parts or PARTS:
        lines, command = [], f"python benchmarks gpu {part}"
        for line in PARTS[part](asked):
            print(line, flush=True)
            lines.append(line)
            if not (asked.small or asked.any_device):
                write(f"gpu_{part}", [*heading(command), *lines])
    return 0


if __name__ == "__main__":
    sys.exit(main())
