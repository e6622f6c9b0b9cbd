"""How close AdamW and Muon come to the limits of the machine; writes its part of docs/benchmarks.md.

    python benchmarks limit                               # two minutes
    python benchmarks limit --width 32 --megabytes 1      # a trial; writes nothing

The limits are measured here: bytes per second of a copy between two buffers and of an addition in
place, whichever is faster; and operations per second of float32 products of square matrices, at the
fastest size. AdamW has to move 28 bytes per float32 parameter: gradient, parameter and two moments are
read, all but the gradient are written. Muon's operations are those of five Newton–Schulz steps in their
plain form on matrices [m, n], m ≤ n: 4 m² n + 2 m³ each. Ours needs fewer in the Gram form, as the
planner's counter shows; the table has both shares.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ravine
from measure import Contender, heading, spread, write
from peers.gpt_tree import gpt_tree
from ravine.optimizers.roles import IN_OUT
from ravine.training.plan.flops import arithmetic

STEPS = 5
BYTES = 28
RULES = ((".*", "matrix", IN_OUT),)


def newton_schulz_flop(shape: tuple[int, ...]) -> float:
    """Operations for one matrix, by formula.

    >>> newton_schulz_flop((2, 3)) == 5 * (4 * 4 * 3 + 2 * 8)
    True
    """
    m, n = sorted(shape)
    return STEPS * (4.0 * m * m * n + 2.0 * m**3)


def _seconds(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def bandwidth(megabytes: int, repeats: int) -> dict[str, list[float]]:
    """Gigabytes per second, read and written, of two ways to move them."""
    size = megabytes * 250_000
    held = {"source": jnp.ones(size, jnp.float32), "target": jnp.zeros(size, jnp.float32)}
    copied = jax.jit(lambda target, source: target.at[:].set(source), donate_argnums=0)
    added = jax.jit(lambda target: target + jnp.float32(1), donate_argnums=0)

    def copy() -> None:
        held["target"] = jax.block_until_ready(copied(held["target"], held["source"]))

    def add() -> None:
        held["target"] = jax.block_until_ready(added(held["target"]))

    moved = 8 * size / 1e9
    ways = {"copy": copy, "addition in place": add}
    return {name: [moved / s for s in _seconds(call, repeats)] for name, call in ways.items()}


def products(sides: list[int], repeats: int) -> dict[int, list[float]]:
    """Gigaflop per second of float32 products, by side."""
    found = {}
    for side in sides:
        a = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
        multiplied = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
        times = _seconds(lambda f=multiplied, a=a: jax.block_until_ready(f(a, a)), repeats)
        found[side] = [2 * side**3 / 1e9 / s for s in times]
    return found


def steps(tx: optax.GradientTransformation, tree: dict, repeats: int) -> list[float]:
    """Seconds of updates, without the first."""
    contender = Contender(tx, tree)
    contender.compile()
    contender.step()
    return [contender.step() for _ in range(repeats)]


def counted_flop(tx: optax.GradientTransformation, tree: dict) -> float:
    """Operations of an update, by the planner's counter."""
    grads = jax.tree.map(jnp.asarray, tree)
    traced = jax.jit(tx.update).trace(grads, jax.eval_shape(tx.init, grads), grads)
    return arithmetic(traced, devices=1).always


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="another than 512 writes nothing")
    parser.add_argument("--megabytes", type=int, default=256, help="of the buffers that are copied")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    moved = bandwidth(asked.megabytes, asked.repeats)
    rates = products(asked.sides, asked.repeats)
    way, gigabytes = max(
        ((name, statistics.median(x)) for name, x in moved.items()), key=lambda found: found[1]
    )
    side, gigaflop = max(
        ((at, statistics.median(x)) for at, x in rates.items()), key=lambda found: found[1]
    )
    tree = gpt_tree(asked.width)
    needed = BYTES * sum(x.size for x in tree.values()) / 1e9
    adamw = [needed / s for s in steps(ravine.adamw(1e-3, weight_decay=0.1), tree, asked.repeats)]
    tx = ravine.muon(0.02, rules=RULES, weight_decay=0.0)
    by_formula = sum(newton_schulz_flop(x.shape) for x in tree.values()) / 1e9
    counted = counted_flop(tx, tree) / 1e9
    muon = steps(tx, tree, max(3, asked.repeats // 3))
    lines = [
        *heading("python benchmarks limit"),
        "| what | measured | share of the limit |",
        "|---|---|---|",
        *(f"| {name}, GB/s | {spread(found)} | |" for name, found in moved.items()),
        *(f"| product of side {at}, GFLOP/s | {spread(found)} | |" for at, found in rates.items()),
        f"| AdamW, GB/s ({needed:.3g} GB by formula) | {spread(adamw)} "
        f"| {statistics.median(adamw) / gigabytes:.2f} of {way} |",
        f"| Muon, GFLOP/s ({by_formula:.4g} GFLOP by formula) "
        f"| {spread([by_formula / s for s in muon])} "
        f"| {by_formula / statistics.median(muon) / gigaflop:.2f} of side {side} |",
        f"| Muon, GFLOP/s ({counted:.4g} GFLOP counted in the program) "
        f"| {spread([counted / s for s in muon])} "
        f"| {counted / statistics.median(muon) / gigaflop:.2f} of side {side} |",
    ]
    print("\n".join(lines), flush=True)
    if not asked.no_write and asked.width == 512:
        write("limit", lines)


if __name__ == "__main__":
    main()
