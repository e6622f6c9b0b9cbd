"""Muon against `optax.contrib.muon`, paired in one run; writes its part of docs/benchmarks.md.

    python benchmarks/muon.py            # about ten minutes on 2 cores
    python benchmarks/muon.py --no-write # only print

Two trees in float32, every leaf a matrix for both, five Keller steps: a GPT of 19.9 M parameters in 37
leaves (width 512, 6 unscanned layers, vocabulary 2048), and 300 leaves of six shapes (24 layers). Both
updates are jitted with gradients, state and parameters donated as a train step has them, and called
in turn, A B A B; the table gives medians and the median of the ratios of neighbours. Compile time is
lowering and compilation without any cache.
"""

import argparse
import datetime
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import optax
import ravine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARKS = ("<!-- muon -->", "<!-- /muon -->")


def gpt_tree() -> dict:
    """37 leaves: the model of the field's published timings."""
    shapes = {"embed": (2048, 512)}
    for layer in range(6):
        for name in ("query", "key", "value", "output"):
            shapes[f"{layer}/{name}"] = (512, 512)
        shapes |= {f"{layer}/up": (512, 2048), f"{layer}/down": (2048, 512)}
    return fill(shapes)


def many_leaves() -> dict:
    """300 leaves of six shapes: 24 layers of 12, and 12 more."""
    layer = [(256, 256)] * 4 + [(256, 128)] * 2 + [(256, 688)] * 2 + [(688, 256)] * 2
    layer += [(256, 64)] * 1 + [(512, 256)] * 1
    shapes = {f"{at}/{i}": shape for at in range(24) for i, shape in enumerate(layer)}
    shapes |= {f"tail/{i}": (512, 256) for i in range(12)}
    return fill(shapes)


def fill(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return {k: (0.02 * rng.standard_normal(s)).astype(np.float32) for k, s in shapes.items()}


def ours() -> optax.GradientTransformation:
    return ravine.muon(0.02, rules=[(".*", "matrix")], weight_decay=0.0)


def theirs() -> optax.GradientTransformation:
    return optax.contrib.muon(0.02)


class Contender:
    """One optimizer on one tree: compiled once more at every `compile`, stepped by `step`."""

    def __init__(self, tx: optax.GradientTransformation, tree: dict):
        def update(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        self._update = update
        self._grads = jax.tree.map(jax.numpy.asarray, tree)
        self._params = jax.tree.map(lambda x: jax.numpy.asarray(x[::-1].copy()), tree)
        self._state = jax.jit(tx.init)(self._params)

    def compile(self) -> float:
        jax.clear_caches()
        started = time.perf_counter()
        jitted = jax.jit(self._update, donate_argnums=(1, 2))
        self.compiled = jitted.lower(self._grads, self._state, self._params).compile()
        return time.perf_counter() - started

    def step(self) -> float:
        started = time.perf_counter()
        self._state, self._params = self.compiled(self._grads, self._state, self._params)
        jax.block_until_ready(self._params)
        return time.perf_counter() - started

    @property
    def temporary_megabytes(self) -> float:
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6


def paired(tree: dict, repeats: int, compiles: int) -> dict[str, tuple[float, float, float]]:
    """Median of ours, of theirs, and of the ratio, for compilation and step."""
    pair = [Contender(tx, tree) for tx in (ours(), theirs())]
    compile_times = [[c.compile() for c in pair] for _ in range(compiles)]
    for contender in pair:
        contender.step()
    step_times = [[c.step() for c in pair] for _ in range(repeats)]
    rows = {"compile, s": compile_times, "update, s": step_times}
    table = {name: _medians(times) for name, times in rows.items()}
    memory = [c.temporary_megabytes for c in pair]
    return table | {"temporary memory, MB": (memory[0], memory[1], memory[0] / memory[1])}


def _medians(times: list[list[float]]) -> tuple[float, float, float]:
    mine, other = zip(*times, strict=True)
    ratio = statistics.median(a / b for a, b in times)
    return statistics.median(mine), statistics.median(other), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiles", type=int, default=3)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        f"`python benchmarks/muon.py`, {datetime.date.today()}, JAX {jax.__version__}, "
        f"{platform.machine()}, {jax.device_count()} {jax.default_backend()} device(s).",
        "",
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
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        _, after = rest.split(MARKS[1])
        page = before + MARKS[0] + "\n" + "\n".join(lines) + "\n" + MARKS[1] + after
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
