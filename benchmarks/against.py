"""Updates of AdamW, Muon, SOAP and Shampoo against PyTorch's and Optax's, for docs/benchmarks.md.

    OPENBLAS_NUM_THREADS=1 python benchmarks peers      # some minutes, plus installation the first time
    python benchmarks peers --peers FOLDER              # where the peers' environment is or will be
    python benchmarks peers --without-torch --width 32  # only Optax's, small: a trial

The tree is the GPT of 19.9 M parameters in 37 leaves, float32, every leaf a matrix. Ours and Optax's
are jitted, with donated buffers; PyTorch's run eagerly in a separate process, with one thread per
processor. A turn is the mean over a few steps; for SOAP and Shampoo, over a whole period with its
refresh. Turns alternate, A B A B; the table has medians, with the smallest and largest in parentheses,
and the same for the ratio of neighbouring turns.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import optax
import ravine
from measure import Contender, compared, heading, in_turn, write
from peers.environment import FOLDER, interpreter
from peers.gpt_tree import gpt_tree
from peers.talk import Peer
from ravine.optimizers.roles import IN_OUT

RULES = ((".*", "matrix", IN_OUT),)
Build = Callable[[], optax.GradientTransformation]


class Pair(NamedTuple):
    """Ours and theirs; PyTorch's only by name."""

    name: str
    ours: Build
    other: str
    theirs: Build | None
    steps: int
    """Steps per turn."""
    turns: int
    bar: float | None
    """The bar for the ratio, if one was set."""


def adamw() -> optax.GradientTransformation:
    return ravine.adamw(1e-3, weight_decay=0.1)


def muon() -> optax.GradientTransformation:
    return ravine.muon(0.02, rules=RULES, weight_decay=0.0)


def soap() -> optax.GradientTransformation:
    return ravine.soap(1e-3, rules=RULES)


def shampoo() -> optax.GradientTransformation:
    return ravine.shampoo(1e-3, rules=RULES)


def _optax_adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-3, weight_decay=0.1)


def _optax_muon() -> optax.GradientTransformation:
    return optax.contrib.muon(0.02)


PAIRS = (
    Pair("adamw", adamw, "optax.adamw", _optax_adamw, 10, 21, 1.02),
    Pair("adamw", adamw, "torch.optim.AdamW", None, 10, 21, None),
    Pair("muon", muon, "optax.contrib.muon", _optax_muon, 1, 7, 0.40),
    Pair("muon", muon, "torch.optim.Muon", None, 1, 7, None),
    Pair("soap", soap, "pytorch_optimizer.SOAP", None, 10, 2, 0.7),
    Pair("shampoo", shampoo, "pytorch_optimizer.ScalableShampoo", None, 10, 2, None),
)


def row(pair: Pair, peer: Peer | None, width: int, layers: int, turns: int) -> str:
    """The pair's line of the table."""
    jax.clear_caches()
    ours = Contender(pair.ours(), gpt_tree(width, layers))
    ours.compile()
    if pair.theirs is not None:
        other = Contender(pair.theirs(), gpt_tree(width, layers))
        other.compile()
        mean = other.mean
    else:
        assert peer is not None
        peer.ask("optimizer", name=pair.other, width=width, layers=layers)
        mean = lambda steps: peer.ask("mean", steps=steps)
    for warm in (ours.mean, mean):
        warm(1)
    times = in_turn(lambda: ours.mean(pair.steps), lambda: mean(pair.steps), turns or pair.turns)
    return f"| {pair.name} | `{pair.other}` | {compared(times, pair.bar, pair.steps)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=FOLDER, help="folder of their environment")
    parser.add_argument("--without-torch", action="store_true", help="Optax's only; writes nothing")
    parser.add_argument("--only", nargs="+", help="names of ours; writes nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--width", type=int, default=512, help="another than 512 writes nothing")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=0, help="another number than the pairs' own")
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    writes = not (asked.no_write or asked.without_torch or asked.only or asked.width != 512)
    peer = None if asked.without_torch else Peer(interpreter(asked.peers), asked.threads)
    versions = f" Peers: {peer.ask('versions')}, {asked.threads} threads." if peer else ""
    lines = [
        heading("OPENBLAS_NUM_THREADS=1 python benchmarks peers")[0] + versions,
        "",
        "| ours | theirs | ours, ms per step | theirs, ms per step | ratio | bar | turns × steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        if (asked.only and pair.name not in asked.only) or (not peer and not pair.theirs):
            continue
        lines.append(row(pair, peer, asked.width, asked.layers, asked.turns))
        print(lines[-1], flush=True)
        if writes:
            write("peers", lines)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
