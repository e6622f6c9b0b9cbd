"""PyTorch's side of `python benchmarks peers` and `train_step`: answers lines of JSON on stdin.

It runs in the environment that `environment.py` creates, without ravine. It holds one thing at a time:
an optimizer on the tree of 37 leaves, or a model in training.
"""

import argparse
import importlib.metadata
import json
import sys
import time

import pytorch_optimizer
import torch
from gpt_tree import gpt_tree, gradients
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch_model import Training

OPTIMIZERS = {
    "torch.optim.AdamW": lambda params: torch.optim.AdamW(
        params, lr=1e-3, weight_decay=0.1, fused=True
    ),
    "torch.optim.Muon": lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.0),
    "pytorch_optimizer.SOAP": lambda params: pytorch_optimizer.SOAP(
        params, lr=1e-3, precondition_frequency=10, max_precondition_dim=10_000
    ),
    "pytorch_optimizer.ScalableShampoo": lambda params: pytorch_optimizer.ScalableShampoo(
        params,
        lr=1e-3,
        block_size=512,
        start_preconditioning_step=1,
        preconditioning_compute_steps=10,
        graft_type=LayerWiseGrafting.RMSPROP,  # the closest option to Adam
    ),
}


class Stepped:
    """An optimizer on the tree, always with the same gradients."""

    def __init__(self, name: str, width: int, layers: int):
        tree = gpt_tree(width, layers)
        params = [torch.nn.Parameter(torch.from_numpy(array)) for array in tree.values()]
        for param, grad in zip(params, gradients(tree).values(), strict=True):
            param.grad = torch.from_numpy(grad)
        self._optimizer = OPTIMIZERS[name](params)

    def mean(self, steps: int) -> float:
        """Seconds per step, over this many steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self._optimizer.step()
        return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # so that other prints are not taken for answers
    held = None
    for line in sys.stdin:
        given = json.loads(line)
        question = given.pop("question")
        if question == "versions":
            names = ("torch", "pytorch-optimizer")
            answer = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        elif question == "optimizer":
            held = None  # frees the one before
            held, answer = Stepped(**given), None
        elif question == "training":
            held = None
            held = Training(**given)
            answer = held.first()
        elif question == "mean":
            answer = held.mean(**given)
        else:
            raise ValueError(f"unknown question {question!r}.")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
