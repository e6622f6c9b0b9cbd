"""What schedules cost: every shape at 100,000 counts, jitted, against `optax.cosine_decay_schedule`.

    python benchmarks/schedules.py                      # seconds

Both are called in turn, and the fastest call of each counts, since interference by other processes only
slows calls down.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from ravine import schedules as s

STEPS, COUNTS, REPEATS = 1000, 100_000, 40


def seconds(function, counts) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(counts))
    return time.perf_counter() - started


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    counts = jnp.arange(COUNTS)
    cosine = jax.jit(optax.cosine_decay_schedule(1e-3, STEPS))
    print(f"JAX {jax.__version__}, {jax.device_count()} {jax.default_backend()} device(s)")
    for name in s.schedule_names():
        shape = jax.jit(s.for_run(name, 1e-3, STEPS, batch_size=16, context=64))
        pairs = [(seconds(shape, counts), seconds(cosine, counts)) for _ in range(REPEATS + 1)][1:]
        ours, optax_best = (min(times) for times in zip(*pairs, strict=True))
        print(
            f"{name:24} {1e3 * ours:7.3f} ms {ours / optax_best:6.2f} x Optax's cosine", flush=True
        )


if __name__ == "__main__":
    main()
