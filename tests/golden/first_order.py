"""Regenerates `first_order.json`: 50 steps of the official first-order optimizers, in PyTorch.

Run in an environment of its own, since ravine needs no PyTorch:

    python3 -m venv ../torch-venv && ../torch-venv/bin/pip install torch==2.13.0 numpy
    ../torch-venv/bin/python tests/golden/first_order.py --lion lion_pytorch.py

`lion_pytorch.py` is the authors' file, `lion/lion_pytorch.py` of https://github.com/google/automl
at LION_COMMIT, with the contents that LION_SHA256 names.

`torch.optim.NAdam` is not among the cases: it has a momentum schedule (`momentum_decay`) that no
setting turns off (0 halves b1), where ravine's and Optax's NAdam follow Dozat without it.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import torch

LION_COMMIT = "b21d6ced9bc9b748e1c8ab9fdebf2c44c57e63ae"
LION_SHA256 = "5ea5d205df80a0cf5f4794e50e3ffe27628e036c4d37664554a424f7b186f9fb"
SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 5), "tensor": (3, 1, 4)}
# Gradients of very different sizes: what an epsilon or a missing root does shows at the ends.
SCALES = {"scalar": 1.0, "vector": 0.01, "matrix": 1.0, "tensor": 10.0}
STEPS = 50
RECORDED = (1, 2, 3, 5, 10, 20, 50)

# name, class, peak learning rate, arguments. `weight_decay` is what torch calls it: added to the
# gradient, except in AdamW and Lion, where it is decoupled. An epsilon of 0.01 is as large as the
# gradients of the vector: in the wrong place it would show.
CASES = (
    ("sgd", "SGD", 0.05, {}),
    ("sgd, L2", "SGD", 0.05, {"weight_decay": 0.1}),
    ("sgd, momentum", "SGD", 0.02, {"momentum": 0.9}),
    ("sgd, momentum, L2", "SGD", 0.02, {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd, nesterov", "SGD", 0.02, {"momentum": 0.9, "nesterov": True}),
    ("sgd, dampening", "SGD", 0.02, {"momentum": 0.9, "dampening": 0.3}),
    ("adagrad", "Adagrad", 0.1, {}),
    (
        "adagrad, L2",
        "Adagrad",
        0.1,
        {"weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 0.01},
    ),
    ("rmsprop", "RMSprop", 0.02, {}),
    ("rmsprop, L2", "RMSprop", 0.02, {"weight_decay": 0.1, "alpha": 0.9, "eps": 0.01}),
    ("rmsprop, centered", "RMSprop", 0.02, {"centered": True, "eps": 0.01}),
    ("rmsprop, momentum", "RMSprop", 0.01, {"momentum": 0.9}),
    ("rmsprop, centered, momentum", "RMSprop", 0.01, {"centered": True, "momentum": 0.9}),
    ("adam", "Adam", 0.05, {}),
    ("adam, L2", "Adam", 0.05, {"betas": [0.9, 0.95], "eps": 0.01, "weight_decay": 0.1}),
    ("adamw", "AdamW", 0.05, {}),
    ("adamw, b2 0.95", "AdamW", 0.05, {"betas": [0.9, 0.95], "weight_decay": 0.1}),
    ("lion", "Lion", 0.02, {}),
    ("lion, weight decay", "Lion", 0.02, {"betas": [0.95, 0.98], "weight_decay": 0.5}),
)


def inputs() -> dict:
    """Initial parameters, gradients and learning-rate factors, short decimals that JSON keeps."""
    rng = np.random.default_rng(20261121)
    initial, gradients = {}, {}
    for name, shape in SHAPES.items():
        initial[name] = np.round(rng.normal(size=shape), 3)
        gradients[name] = np.round(rng.normal(size=(STEPS, *shape)), 3) * SCALES[name]
    gradients["vector"][:, 1] = 0.0  # one coordinate never sees a gradient
    gradients["matrix"][10:16] = 0.0  # one leaf has none for a while
    gradients = {k: np.round(g, 6) for k, g in gradients.items()}
    factors = [round(min((t + 1) / 5, 0.5 + 0.5 * math.cos(0.06 * t)), 4) for t in range(STEPS)]
    return {
        "seed": 20261121,
        "initial": {k: v.tolist() for k, v in initial.items()},
        "gradients": {k: v.tolist() for k, v in gradients.items()},
        "learning_rate_factors": factors,
    }


def trajectory(optimizer_class, peak, arguments, data, dtype) -> dict:
    params = {k: torch.tensor(v, dtype=dtype) for k, v in data["initial"].items()}
    params = {k: torch.nn.Parameter(v) for k, v in params.items()}
    optimizer = optimizer_class(params.values(), lr=peak, **arguments)
    gradients = {k: torch.tensor(v, dtype=dtype) for k, v in data["gradients"].items()}
    recorded = {}
    for step, factor in enumerate(data["learning_rate_factors"]):
        optimizer.param_groups[0]["lr"] = peak * factor
        for name, p in params.items():
            p.grad = gradients[name][step].clone()
        optimizer.step()
        if step + 1 in RECORDED:
            # Nine digits tell all float32 numbers apart, seventeen all float64 ones.
            digits = 9 if dtype == torch.float32 else 17
            recorded[step + 1] = {
                k: [float(f"{x:.{digits}g}") for x in p.detach().flatten().tolist()]
                for k, p in params.items()
            }
    return recorded


def load_lion(path: Path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != LION_SHA256:
        raise SystemExit(f"{path} has sha256 {digest}, not that of the authors' file.")
    spec = importlib.util.spec_from_file_location("lion_pytorch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lion", type=Path, required=True, help="the authors' lion_pytorch.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    lion = load_lion(args.lion)
    data = inputs()
    data["cases"] = {}
    for name, class_name, peak, arguments in CASES:
        is_lion = class_name == "Lion"
        optimizer_class = lion if is_lion else getattr(torch.optim, class_name)
        data["cases"][name] = {
            "source": "google/automl lion/lion_pytorch.py"
            if is_lion
            else f"torch.optim.{class_name}",
            "version": f"commit {LION_COMMIT[:12]}, torch {torch.__version__}"
            if is_lion
            else f"torch {torch.__version__}",
            "date": datetime.date.today().isoformat(),
            "class": class_name,
            "peak_learning_rate": peak,
            "arguments": arguments,
            "float64": trajectory(optimizer_class, peak, arguments, data, torch.float64),
            "float32": trajectory(optimizer_class, peak, arguments, data, torch.float32),
        }
    args.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {len(CASES)} cases")


if __name__ == "__main__":
    main()
