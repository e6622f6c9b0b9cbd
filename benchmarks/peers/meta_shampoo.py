"""Time Meta's Distributed Shampoo (PyTorch) on the tree of 37 leaves; prints one line of JSON.

    git clone https://github.com/facebookresearch/optimizers
    python -m venv torch
    torch/bin/pip install torch==2.13.0 numpy
    torch/bin/python benchmarks/peers/meta_shampoo.py --checkout optimizers

Worked with torch 2.13.0 for CPUs on Python 3.11.7 (its metadata requires 3.12) and commit
f60660661194 of the repository. One device, eager mode, inverse roots by `eigh`: the defaults.
Steps 10, 20, … compute inverse roots. Steps 1 to 9 only graft, at half the cost of a later step: with
`--warmup 10` none of them is timed; with the peers' warm-up of one step, the default, eight are.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from gpt_tree import gpt_tree, gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", required=True, help="path of facebookresearch/optimizers")
    parser.add_argument("--steps", type=int, default=21, help="1 + the timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps, `every` for steady")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--block", type=int, default=512, help="side of a block")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, options.checkout)
    from distributed_shampoo import AdamPreconditionerConfig, DistributedShampoo

    tree = gpt_tree()
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in tree.values()]
    for param, grad in zip(params, gradients(tree).values(), strict=True):
        param.grad = torch.from_numpy(grad)
    optimizer = DistributedShampoo(
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        epsilon=1e-12,
        max_preconditioner_dim=options.block,
        precondition_frequency=options.every,
        start_preconditioning_step=options.every,
        grafting_config=AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    )
    seconds = []
    for _ in range(options.warmup + options.steps - 1):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    git = ["git", "-C", options.checkout, "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    report = {
        "peer": "meta distributed_shampoo",
        "version": f"commit {commit}, torch {torch.__version__}",
        "compile_s": 0.0,
        "first_step_s": seconds[0],
        "step_s": seconds[options.warmup :],
        "state_bytes": sum(storages(list(optimizer.state.values())).values()),
        "parameter_bytes": sum(storages(params).values()),
    }
    print(json.dumps(report))


def storages(held: object) -> dict[int, int]:
    """Address -> bytes of every tensor's storage in nested containers and plain objects."""
    if isinstance(held, torch.Tensor):
        return {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes()}
    if isinstance(held, dict):
        held = list(held.values())
    elif not isinstance(held, list | tuple):
        held = list(getattr(held, "__dict__", {}).values())
    found = {}
    for item in held:
        found |= storages(item)
    return found


if __name__ == "__main__":
    main()
