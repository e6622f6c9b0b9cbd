"""Muon against `optax.contrib.muon`, paired in one run; writes its part of docs/benchmarks.md.

    python benchmarks/muon.py            # about ten minutes on 2 cores
    python benchmarks/muon.py --no-write # only print

There are two trees in float32, with five Keller steps and every leaf a matrix for both optimizers: a
GPT of 19.9 M parameters in 37 leaves (width 512, 6 unscanned layers, vocabulary 2048), and 300 leaves
of six shapes (24 layers). Both updates are jitted, with gradients, state and parameters donated as in a
train step, and called in turn, A B A B; the table gives medians, and the median of the ratios of
neighbouring calls. Compile time is lowering and compilation without any cache.
"""

import argparse

import jax
import optax
import ravine
from measure import Contender, heading, medians, write
from peers.gpt_tree import fill, gpt_tree
from ravine.optimizers.roles import IN_OUT


def many_leaves() -> dict:
    """300 leaves of six shapes: 24 layers of 12, and 12 more."""
    layer = [(256, 256)] * 4 + [(256, 128)] * 2 + [(256, 688)] * 2 + [(688, 256)] * 2
    layer += [(256, 64)] * 1 + [(512, 256)] * 1
    shapes = {f"{at}/{i}": shape for at in range(24) for i, shape in enumerate(layer)}
    shapes |= {f"tail/{i}": (512, 256) for i in range(12)}
    return fill(shapes)


def ours() -> optax.GradientTransformation:
    return ravine.muon(0.02, rules=[(".*", "matrix", IN_OUT)], weight_decay=0.0)


def theirs() -> optax.GradientTransformation:
    return optax.contrib.muon(0.02)


def paired(tree: dict, repeats: int, compiles: int) -> dict[str, tuple[float, float, float]]:
    """Medians of our times, their times and the ratios, for compilation and step."""
    pair = [Contender(tx, tree) for tx in (ours(), theirs())]
    compile_times = [[c.compile() for c in pair] for _ in range(compiles)]
    for contender in pair:
        contender.step()
    step_times = [[c.step() for c in pair] for _ in range(repeats)]
    rows = {"compile, s": compile_times, "update, s": step_times}
    table = {name: medians(times) for name, times in rows.items()}
    memory = [c.temporary_megabytes for c in pair]
    return table | {"temporary memory, MB": (memory[0], memory[1], memory[0] / memory[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiles", type=int, default=3)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        *heading("python benchmarks/muon.py"),
        "| tree | what | ravine | optax | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, tree, repeats in (
        ("37 leaves, 19.9 M", gpt_tree(), arguments.repeats),
        ("300 leaves, 6 shapes", many_leaves(), arguments.repeats),
    ):
        for what, (mine, other, ratio) in paired(tree, repeats, arguments.compiles).items():
            lines.append(f"| {name} | {what} | {mine:.3g} | {other:.3g} | {ratio:.3f} |")
            print(lines[-1], flush=True)
    if not arguments.no_write:
        write("muon", lines)


if __name__ == "__main__":
    main()
