"""Time Google's Distributed Shampoo (JAX) on the tree of 37 leaves; prints one line of JSON.

    python -m venv google
    google/bin/pip install precondition-opt==0.3.0 jax==0.4.30 jaxlib==0.4.30 chex==0.1.86 \
        optax==0.2.3 flax==0.8.5 "numpy<2" "scipy<1.14" "ml_dtypes<0.5"
    google/bin/python benchmarks/peers/google_shampoo.py

These versions worked on Python 3.11.7, with numpy 1.26.4. Step 0 refreshes the preconditioners and is
the warm-up; then steps 10, 20, … refresh. Grafting is RMSPROP, the closest option to Adam; the rest are
the defaults of the library and of JAX, so that without x64 roots are computed in float32.
"""

import argparse
import json
import time
from importlib.metadata import version

import jax
import optax
from gpt_tree import gpt_tree, gradients
from precondition.distributed_shampoo import GraftingType, distributed_shampoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=21, help="the warm-up and whole periods")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--block", type=int, default=512, help="side of a block")
    options = parser.parse_args()
    tx = distributed_shampoo(
        learning_rate=1e-3,
        block_size=options.block,
        start_preconditioning_step=5,
        preconditioning_compute_steps=options.every,
        graft_type=GraftingType.RMSPROP,
        batch_axis_name=None,
    )

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    tree = gpt_tree()
    params = jax.tree_util.tree_map(jax.numpy.asarray, tree)
    grads = jax.tree_util.tree_map(jax.numpy.asarray, gradients(tree))
    state = jax.jit(tx.init)(params)
    parameter_bytes, state_bytes = (
        sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(x)) for x in (params, state)
    )
    started = time.perf_counter()
    step = jax.jit(update, donate_argnums=(1, 2)).lower(grads, state, params).compile()
    compile_s = time.perf_counter() - started
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        state, params = step(grads, state, params)
        jax.block_until_ready((state, params))
        seconds.append(time.perf_counter() - started)
    report = {
        "peer": "google distributed_shampoo",
        "version": f"precondition-opt {version('precondition-opt')}, jax {jax.__version__}",
        "compile_s": compile_s,
        "first_step_s": seconds[0],
        "step_s": seconds[1:],
        "state_bytes": state_bytes,
        "parameter_bytes": parameter_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
