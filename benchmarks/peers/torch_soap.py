"""Time the SOAP of its authors (PyTorch) on the tree of 37 leaves; prints one line of JSON.

    git clone https://github.com/nikhilvyas/SOAP
    python -m venv torch
    torch/bin/pip install torch==2.13.0 numpy
    torch/bin/python benchmarks/peers/torch_soap.py --soap SOAP/soap.py

Worked with torch 2.13.0 for CPUs on Python 3.11.7 and commit a1e553530fde of the repository. Call 0
computes the first eigenbases, does not move the parameters, and is the warm-up; then calls 10, 20, …
refresh. Apart from the frequency, everything is the default: dimensions up to 10000 are preconditioned
whole, without blocks.
"""

import argparse
import hashlib
import json
import runpy
import time
from pathlib import Path

import torch
from gpt_tree import gpt_tree, gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soap", type=Path, required=True, help="path of soap.py")
    parser.add_argument("--steps", type=int, default=21, help="the warm-up and whole periods")
    parser.add_argument("--every", type=int, default=10, help="steps between refreshes")
    parser.add_argument("--block", type=int, default=512, help="unused: SOAP has no blocks")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tree = gpt_tree()
    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in tree.values()]
    for param, grad in zip(params, gradients(tree).values(), strict=True):
        param.grad = torch.from_numpy(grad)
    soap = runpy.run_path(str(options.soap))["SOAP"]
    optimizer = soap(params, precondition_frequency=options.every)
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    digest = hashlib.sha256(options.soap.read_bytes()).hexdigest()[:12]
    report = {
        "peer": "nikhilvyas/SOAP",
        "version": f"soap.py sha256 {digest}, torch {torch.__version__}",
        "compile_s": 0.0,
        "first_step_s": seconds[0],
        "step_s": seconds[1:],
        "state_bytes": sum(tensor_bytes(state) for state in optimizer.state.values()),
        "parameter_bytes": sum(tensor_bytes(param) for param in params),
    }
    print(json.dumps(report))


def tensor_bytes(held: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    if isinstance(held, dict):
        return sum(map(tensor_bytes, held.values()))
    return sum(map(tensor_bytes, held)) if isinstance(held, list) else 0


if __name__ == "__main__":
    main()
