"""Shampoo and SOAP against Google's, Meta's and the authors'; writes its part of docs/benchmarks.md.

    OPENBLAS_NUM_THREADS=1 python benchmarks/shampoo.py --torch PYTHON --meta CHECKOUT --soap soap.py \\
        --google PYTHON

The peers run with the interpreters of their own environments, one process after the other (`peers/`
says what each needs); a peer without its option is left out. The tree is the GPT of 19.9 M parameters
in 37 leaves; float32; blocks of 512, roots every 10 steps, Adam graft; SOAP unblocked, bases every 10.
Times cover complete periods, with preconditioning from the first measured step on. With more threads on
two cores, OpenBLAS takes longer for one matrix of 512, and spins afterwards.
"""

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import jax
import optax
import ravine
from measure import Contender, heading, write
from peers.gpt_tree import gpt_tree
from ravine.optimizers.roles import IN_OUT

HERE = Path(__file__).parent
RULES = ((".*", "matrix", IN_OUT),)
OURS = {
    "ravine.shampoo": lambda: ravine.shampoo(1e-3, rules=RULES),
    "ravine.shampoo, staggered": lambda: ravine.shampoo(
        1e-3, rules=RULES, refresh=ravine.Refresh(staggered=True)
    ),
    "ravine.soap": lambda: ravine.soap(1e-3, rules=RULES),
    "ravine.soap, staggered": lambda: ravine.soap(
        1e-3, rules=RULES, refresh=ravine.Refresh(staggered=True)
    ),
}


def measure(tx: optax.GradientTransformation, steps: int) -> dict:
    """The output of the peers' scripts: seconds to compile and per step, and bytes."""
    contender = Contender(tx, gpt_tree())
    compile_seconds = contender.compile()
    seconds = [contender.step() for _ in range(steps)]
    state, params = contender.bytes
    return {
        "compile_s": compile_seconds,
        "step_s": seconds[-20:],
        "state_bytes": state,
        "parameter_bytes": params,
    }


def peer(*command: str) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(name: str, found: dict) -> str:
    seconds = found["step_s"]
    values = statistics.median(seconds), statistics.mean(seconds), max(seconds)
    times = " | ".join(f"{value:.3g}" for value in (found["compile_s"], *values))
    ratio = found["state_bytes"] / found["parameter_bytes"]
    return f"| {name} | {times} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="interpreter with PyTorch")
    parser.add_argument("--meta", help="checkout of facebookresearch/optimizers")
    parser.add_argument("--soap", help="soap.py of nikhilvyas/SOAP")
    parser.add_argument("--google", help="interpreter with precondition-opt")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    lines = [
        *heading(
            "OPENBLAS_NUM_THREADS=1 python benchmarks/shampoo.py --torch ... --meta ... --soap ..."
        ),
        "| optimizer | compile, s | median step, s | mean step, s | slowest, s | state / parameters |",
        "|---|---|---|---|---|---|",
    ]

    def add(name: str, found: dict) -> None:
        lines.append(row(name, found))
        print(lines[-1], flush=True)

    peers = str(HERE / "peers")
    if arguments.torch and arguments.meta:
        options = ("--checkout", arguments.meta, "--warmup", "10")
        add("Meta, PyTorch", peer(arguments.torch, f"{peers}/meta_shampoo.py", *options))
    for name, make in OURS.items():
        add(name, measure(make(), 30))
        jax.clear_caches()
    if arguments.torch and arguments.soap:
        add(
            "SOAP, PyTorch",
            peer(arguments.torch, f"{peers}/torch_soap.py", "--soap", arguments.soap),
        )
    if arguments.google:
        add("Google, JAX", peer(arguments.google, "-W", "ignore", f"{peers}/google_shampoo.py"))
    if not arguments.no_write:
        write("shampoo", lines)


if __name__ == "__main__":
    main()
