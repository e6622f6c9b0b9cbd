"""CPU-seconds to trace and compile an update, by the number of equal leaves.

    python benchmarks compile_time [--leaves 8 32 128] [--side 64] [--only shampoo soap]

It measures CPU time instead of wall-clock time, since other load on the machine affects it less. The
CPU time of an update and a checksum of the results are printed too: faster compilation must not slow
down the update or change its results.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import ravine

OPTIMIZERS = {
    "shampoo": ravine.scale_by_shampoo,
    "soap": ravine.scale_by_soap,
    "kl_shampoo": ravine.scale_by_kl_shampoo,
    "muon": ravine.scale_by_muon,
}


@functools.cache
def gradients(leaves: int, side: int) -> dict[str, jax.Array]:
    """Leaves of equal shapes, with different numbers."""
    rng = np.random.default_rng(0)
    return {
        f"{at:03}": jnp.asarray(rng.normal(size=(side, side)), jnp.float32) for at in range(leaves)
    }


def measured(name: str, leaves: int, side: int, steps: int) -> tuple[float, float, float]:
    """CPU-seconds to compile, CPU-milliseconds per update, checksum."""
    tx, grads = OPTIMIZERS[name](), gradients(leaves, side)
    state = jax.jit(tx.init)(grads)
    jax.block_until_ready(state)
    start = time.process_time()
    update = jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile()
    compiled, updates = time.process_time() - start, grads
    start = time.process_time()
    for _ in range(steps):
        updates, state = jax.block_until_ready(update(grads, state))
    spent = 1e3 * (time.process_time() - start) / steps
    total = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(updates))
    return compiled, spent, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    asked = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    for name in asked.only:
        measured(name, 1, 8, 1)  # work that is done only once
        for leaves in asked.leaves:
            compiled, update, total = measured(name, leaves, asked.side, asked.steps)
            print(
                f"{name:<11} {leaves:>4} leaves: compiled in {compiled:6.2f} CPU-seconds, "
                f"update {update:8.2f} ms, checksum {total:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
