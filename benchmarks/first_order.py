"""First-order optimizers against Optax's own, paired in one run; writes its parts of docs/benchmarks.md.

    python benchmarks/first_order.py                 # about nine minutes on 2 cores
    python benchmarks/first_order.py --only adamw    # one pair, only printed

There are two trees in float32: a GPT of 19.9 M parameters in 37 leaves, and the same number in 300
leaves of six shapes. Buffers are donated as in a train step. Both optimizers are called in turn, A B A
B; the table gives medians, and the median of the ratios of neighbouring calls. Compile time is lowering
and compilation without any cache.
"""

import argparse

import jax
import optax
import ravine
from measure import Contender, heading, medians, write
from peers.gpt_tree import fill, gpt_tree
from ravine.optimizers.roles import IN_OUT

PAIRS = {
    "sgd": (lambda: ravine.sgd(1e-3), lambda: optax.sgd(1e-3)),
    "sgd, nesterov": (
        lambda: ravine.sgd(1e-3, momentum=0.9, nesterov=True),
        lambda: optax.sgd(1e-3, momentum=0.9, nesterov=True),
    ),
    "adagrad": (
        lambda: ravine.adagrad(1e-3, 0.1, eps=0.0, eps_root=1e-7),
        lambda: optax.adagrad(1e-3),
    ),
    "rmsprop": (
        lambda: ravine.rmsprop(1e-3, 0.9, eps=0.0, eps_root=1e-8),
        lambda: optax.rmsprop(1e-3),
    ),
    "adam": (lambda: ravine.adam(1e-3), lambda: optax.adam(1e-3)),
    "adamw": (
        lambda: ravine.adamw(1e-3, weight_decay=0.1),
        lambda: optax.adamw(1e-3, weight_decay=0.1),
    ),
    "nadamw": (
        lambda: ravine.nadamw(1e-3, weight_decay=0.1),
        lambda: optax.nadamw(1e-3, weight_decay=0.1),
    ),
    "adan": (
        lambda: ravine.adan(1e-3, weight_decay=0.1, no_prox=True),
        lambda: optax.adan(1e-3, weight_decay=0.1),
    ),
    "ademamix": (
        lambda: ravine.ademamix(1e-3, weight_decay=0.1),
        lambda: optax.contrib.ademamix(1e-3, weight_decay=0.1),
    ),
    "schedule_free_adamw": (
        lambda: ravine.schedule_free_adamw(1e-3, weight_decay=0.1),
        lambda: optax.contrib.schedule_free_adamw(1e-3, weight_decay=0.1),
    ),
    "lion": (
        lambda: ravine.lion(1e-4, weight_decay=0.1),
        lambda: optax.lion(1e-4, weight_decay=0.1),
    ),
}


def many_leaves() -> dict:
    """300 leaves of six shapes, 19.9 M parameters: 50 layers of six."""
    layer = [(256, 256)] * 3 + [(256, 512), (512, 128), (256, 32)]
    return fill({f"{at}/{i}": shape for at in range(50) for i, shape in enumerate(layer)})


MICRO_STEPS = 8


def accumulation(repeats: int) -> tuple[float, float, float]:
    """Milliseconds of eight micro-steps of Muon, by `accumulate` and by `optax.MultiSteps`."""
    muon = ravine.muon(0.02, rules=[(".*", "matrix", IN_OUT)])
    txs = (ravine.accumulate(muon, MICRO_STEPS), optax.MultiSteps(muon, MICRO_STEPS))
    contenders = [Contender(tx, gpt_tree()) for tx in txs]
    for contender in contenders:
        contender.compile()
    cycle = lambda contender: sum(contender.step() for _ in range(MICRO_STEPS))
    for contender in contenders:
        cycle(contender)
    return medians([[cycle(c) for c in contenders] for _ in range(repeats)])


def paired(pair: tuple, tree: dict, repeats: int, compiles: int) -> dict[str, tuple]:
    """Medians of our times, their times and the ratios, for compilation and step."""
    contenders = [Contender(make(), tree) for make in pair]
    compile_times = []
    for at in range(compiles):  # each is first in turn
        order = contenders if at % 2 == 0 else contenders[::-1]
        times = {id(c): c.compile() for c in order}
        compile_times.append([times[id(c)] for c in contenders])
    for contender in contenders:
        contender.step()
    step_times = [[c.step() for c in contenders] for _ in range(repeats)]
    return {"compile": medians(compile_times), "update": medians(step_times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--compiles", type=int, default=6)
    parser.add_argument("--only", nargs="*", help="these pairs, without writing")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()).difference(PAIRS)
    if unknown:
        parser.error(f"unknown pair {min(unknown)!r}; known: {', '.join(PAIRS)}")
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        *heading("python benchmarks/first_order.py"),
        "| optimizer | leaves | compile, ms | Optax's | ratio | update, ms | Optax's | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arguments.only if arguments.only is not None else PAIRS:
        for tree in (gpt_tree(), many_leaves()):
            rows = paired(PAIRS[name], tree, arguments.repeats, arguments.compiles)
            cells = [
                f"{1e3 * x:.3g} | {1e3 * y:.3g} | {ratio:.3f}" for x, y, ratio in rows.values()
            ]
            lines.append(f"| {name} | {len(tree)} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.only is None:
        write("first_order", lines)
        mine, other, ratio = accumulation(repeats=3)
        lines = [
            *heading("python benchmarks/first_order.py"),
            "| eight micro-steps | accumulate, ms | optax.MultiSteps, ms | ratio |",
            "|---|---|---|---|",
            f"| Muon, 37 leaves | {1e3 * mine:.4g} | {1e3 * other:.4g} | {ratio:.3f} |",
        ]
        print(lines[-1], flush=True)
        write("accumulation", lines)


if __name__ == "__main__":
    main()
