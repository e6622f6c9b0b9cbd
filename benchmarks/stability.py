"""What stability costs: the fused loss against full logits, monitors and guards in a train step.

    python benchmarks/stability.py                      # about ten minutes on 2 cores
    python benchmarks/stability.py --only fused         # one part

Everything is paired: both are called in turn, A B A B, and the ratios are medians over neighbouring
calls. Memory is XLA's own figure for a compiled program's temporaries.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import ravine
from measure import Contender
from peers.gpt_tree import gpt_tree
from ravine import stability
from ravine.optimizers.roles import RAVINE_RULES
from ravine.training.model import ModelConfig
from ravine.training.step import MEASURED, init_params, init_state, make_train_step

TOKENS, VOCABULARY, WIDTH = (8, 1024), 50257, 768
OPTIONS = {"z_loss": 1e-4}


def alternate(functions: list, repeats: int) -> list[list[float]]:
    """Seconds of each function, called in turn, without the first round."""
    times = []
    for _ in range(repeats + 1):
        row = []
        for function in functions:
            started = time.perf_counter()
            jax.block_until_ready(function())
            row.append(time.perf_counter() - started)
        times.append(row)
    return times[1:]


def report(name: str, times: list[list[float]]) -> None:
    ours, other = zip(*times, strict=True)
    ratio = statistics.median(a / b for a, b in times)
    milliseconds = (1e3 * statistics.median(side) for side in (ours, other))
    print(name, *(f"{value:.4g} ms" for value in milliseconds), f"ratio {ratio:.4f}", flush=True)


def fused(repeats: int, width: int) -> None:
    """Loss and both gradients for 8 x 1024 tokens x 50257: temporaries and time."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (*TOKENS, width))
    unembedding = jax.random.normal(keys[1], (width, VOCABULARY)) * width**-0.5
    labels = jax.random.randint(keys[2], TOKENS, 0, VOCABULARY)

    def held(hidden, unembedding):
        parts = stability.cross_entropy(hidden @ unembedding, labels, **OPTIONS)
        return stability.token_mean(parts.loss + parts.z_loss)

    def chunked(hidden, unembedding):
        return stability.fused_cross_entropy(hidden, unembedding, labels, **OPTIONS)[0]

    compiled = [
        jax.jit(jax.value_and_grad(f, (0, 1))).lower(hidden, unembedding).compile()
        for f in (chunked, held)
    ]
    sizes = [c.memory_analysis().temp_size_in_bytes / 1e6 for c in compiled]
    print(
        f"fused, width {width}: {sizes[0]:.1f} MB of temporaries, {sizes[1]:.1f} with the logits held,"
    )
    print(f"  ratio 1/{sizes[1] / sizes[0]:.1f}", flush=True)
    run = lambda c: lambda: c(hidden, unembedding)[0]
    report("  fused, held:", alternate([run(c) for c in compiled], repeats))


def monitors(repeats: int) -> None:
    """Ten train steps of the race's model, in which all monitors sample once."""
    config = ModelConfig()
    graphdef, params = init_params(config, 0)
    batch = jax.random.randint(jax.random.key(0), (16, config.context + 1), 0, config.vocabulary)
    plain = ravine.adamw(1e-3)
    watched = stability.with_monitors(plain, RAVINE_RULES, every=10, measured=MEASURED)
    runs = []
    for tx, every in ((watched, 10), (plain, 0)):
        carry = [init_state(jax.tree.map(jnp.copy, params), tx)]
        step = jax.jit(make_train_step(graphdef, tx, monitor_every=every), donate_argnums=0)

        def ten(carry=carry, step=step):
            for _ in range(10):
                carry[0], _ = step(carry[0], batch)
            return carry[0]

        runs.append(ten)
    report("monitors, ten steps with and without:", alternate(runs, repeats))


def guards(repeats: int) -> None:
    """AdamW on 19.9 M parameters with and without the guard around it; buffers are donated."""
    plain = ravine.adamw(1e-3, weight_decay=0.1)
    for name, guard in (
        ("finite_gate", stability.finite_gate(plain)),
        ("skip_step", stability.skip_step(plain)),
    ):
        contenders = [Contender(with_loss(tx), gpt_tree()) for tx in (guard, plain)]
        for contender in contenders:
            contender.compile()
        times = [[c.step() for c in contenders] for _ in range(repeats + 1)][1:]
        report(f"{name}, AdamW with and without:", times)
        contenders = [GuardedContender(guard, gpt_tree()), Contender(plain, gpt_tree())]
        for contender in contenders:
            contender.compile()
        times = [[c.step() for c in contenders] for _ in range(repeats + 1)][1:]
        report(f"{name} by guarded_step, AdamW with and without:", times)


class GuardedContender(Contender):
    """The same step, with the condition around update and addition."""

    def __init__(self, tx, tree):
        super().__init__(tx, tree)

        def update(grads, state, params):
            step = stability.guarded_step(tx, grads, state, params, loss=1.0)
            return step.state, step.params

        self._update = update


def with_loss(tx):
    tx = optax.with_extra_args_support(tx)
    update = lambda grads, state, params: tx.update(grads, state, params, loss=1.0)
    return optax.GradientTransformation(tx.init, update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["fused", "monitors", "guards"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=WIDTH)
    arguments = parser.parse_args()
    print(
        f"JAX {jax.__version__}, {jax.device_count()} {jax.default_backend()} device(s)", flush=True
    )
    if arguments.only in (None, "monitors"):
        monitors(10 * arguments.repeats)
    if arguments.only in (None, "guards"):
        guards(5 * arguments.repeats)
    if arguments.only in (None, "fused"):
        fused(arguments.repeats, arguments.width)


if __name__ == "__main__":
    main()
