"""How update and compile time grow with parameters and with leaves, for docs/benchmarks.md.

    python benchmarks growth                              # some minutes
    python benchmarks growth --only adamw --parameters 1 4 --leaves 8 32 --no-write

The number of parameters grows in 16 leaves [512, n]; the number of leaves grows at 2^21 parameters, in
leaves [64, n], with blocks of 64 for Shampoo and SOAP. The slope is that of a straight line through the
logarithms: 1 is proportional, 0 is constant. An update is the mean over a few steps, for Shampoo and
SOAP over a period of ten with its refresh; compilation is timed without a cache.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax
import ravine
from measure import Contender, heading, write
from peers.gpt_tree import fill
from ravine.optimizers.roles import IN_OUT

RULES = ((".*", "matrix", IN_OUT),)
BLOCKS = ravine.Blocks(size=64)
OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], int]] = {
    "adamw": (lambda: ravine.adamw(1e-3, weight_decay=0.1), 10),
    "muon": (lambda: ravine.muon(0.02, rules=RULES), 3),
    "shampoo": (lambda: ravine.shampoo(1e-3, rules=RULES, blocks=BLOCKS), 10),
    "soap": (lambda: ravine.soap(1e-3, rules=RULES, blocks=BLOCKS), 10),
}
BY_PARAMETERS = ("adamw", "muon")


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measured(name: str, leaves: int, shape: tuple[int, int]) -> tuple[float, float]:
    """Milliseconds of an update, seconds to compile it."""
    build, steps = OPTIMIZERS[name]
    contender = Contender(build(), fill({f"{at:03}": shape for at in range(leaves)}))
    compiled = contender.compile()
    contender.step()
    return 1e3 * contender.mean(steps), compiled


def rows(name: str, what: str, sizes: Sequence[int], found: Sequence[tuple[float, float]]) -> list:
    """Lines of the table: updates, then compilation."""
    ends = f"{sizes[0]} to {sizes[-1]}{' M' if what == 'parameters' else ''}"
    lines = []
    for label, values in zip(("update, ms", "compile, s"), zip(*found, strict=True), strict=True):
        cells = ", ".join(f"{value:.3g}" for value in values)
        steep = f"{slope(sizes, values):.2f}" if len(sizes) > 1 else ""
        lines.append(f"| {name} | {what}, {ends} | {label} | {cells} | {steep} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, help="writes nothing")
    parser.add_argument("--parameters", type=int, nargs="*", default=[1, 4, 16, 64], help="in 2^20")
    parser.add_argument("--leaves", type=int, nargs="*", default=[8, 32, 128, 256])
    parser.add_argument("--total", type=int, default=2**21, help="parameters while leaves grow")
    parser.add_argument("--no-write", action="store_true")
    asked = parser.parse_args()
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        *heading("python benchmarks growth"),
        "| optimizer | over | what | measured | slope |",
        "|---|---|---|---|---|",
    ]
    for name in asked.only or OPTIMIZERS:
        measured(name, 1, (64, 64))  # work that is done only once
        found = []
        if asked.parameters and name in BY_PARAMETERS:
            trees = [(16, (512, millions * 2**20 // (16 * 512))) for millions in asked.parameters]
            found += rows(name, "parameters", asked.parameters, [measured(name, *t) for t in trees])
        if asked.leaves:
            trees = [(count, (64, math.ceil(asked.total / count / 64))) for count in asked.leaves]
            found += rows(name, "leaves", asked.leaves, [measured(name, *t) for t in trees])
        lines += found
        print("\n".join(found), flush=True)
    jax.config.update("jax_enable_compilation_cache", cached)
    if not (asked.no_write or asked.only):
        write("growth", lines)


if __name__ == "__main__":
    main()
