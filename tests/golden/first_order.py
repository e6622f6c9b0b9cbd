"""Regenerates `first_order.json`: 50 steps of the official first-order optimizers, in PyTorch.

Run it in a separate environment, because ravine does not need PyTorch:

    python3 -m venv ../torch-venv && ../torch-venv/bin/pip install torch==2.13.0 numpy
    ../torch-venv/bin/python tests/golden/first_order.py --authors FOLDER

FOLDER holds the authors' own files, with the names and contents given in AUTHORS.

`torch.optim.NAdam` is not among the cases: it has a momentum schedule (`momentum_decay`) that no setting
turns off (0 halves b1), while ravine's and Optax's NAdam follow Dozat without it.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch


class Source(NamedTuple):
    """One of the authors' files."""

    repository: str
    path: str
    commit: str
    sha256: str


AUTHORS = {
    "Lion": Source(
        "google/automl",
        "lion/lion_pytorch.py",
        "b21d6ced9bc9b748e1c8ab9fdebf2c44c57e63ae",
        "5ea5d205df80a0cf5f4794e50e3ffe27628e036c4d37664554a424f7b186f9fb",
    ),
    "Adan": Source(
        "sail-sg/Adan",
        "adan.py",
        "2c65beaf400775753b155da4082c3819fea689b9",
        "6b71fdfe0278809dd37297b67456155baba098716fbcd38f7285416966eb27e2",
    ),
    "AdEMAMix": Source(
        "apple/ml-ademamix",
        "pytorch/ademamix.py",
        "c3d73c09f1287e5c33b95189bb0aa7de0a5a7667",
        "e4d247f2f780cd35104f15f10c1802afa5edf5e1732734c24b4a4ae8ca23cc19",
    ),
    "MARS": Source(
        "AGI-Arena/MARS",
        "MARS/optimizers/mars.py",
        "4831e28eba863a4e69d7e9474ff8e73bc1b410fe",
        "5bee9e72aea3f043b415022fd0e732b4995436bd4d3faea4c347c0d54ef273e0",
    ),
    "SophiaG": Source(
        "Liuhong99/Sophia",
        "sophia.py",
        "a7e157229b71d58cf995d32854f1be15c265b350",
        "6822bce9acfedd575e2515222b24a4d927edd6ee5464fc1ce2988224fbfb5855",
    ),
    "AdamWScheduleFreeReference": Source(
        "facebookresearch/schedule_free",
        "schedulefree/adamw_schedulefree_reference.py",
        "70785b53e778d0e872c0bbb75ff4ee54ee10c291",
        "e3c07b2d5b93375892ee1e62f3ca586145589444b2b50d314892e58c47433fa3",
    ),
    "SGDScheduleFreeReference": Source(
        "facebookresearch/schedule_free",
        "schedulefree/sgd_schedulefree_reference.py",
        "70785b53e778d0e872c0bbb75ff4ee54ee10c291",
        "d765e79384b6c642e11cedead2ee131a9515ef20e65574a8efbfa4dbd7f39524",
    ),
    "C-AdamW": Source(
        "kyleliang919/C-Optim",
        "c_adamw.py",
        "2c0517c4db2e50b56d389ba4803eab1f4b3b8ae3",
        "1514a0dfe4b65a38fb01e91399b0d9383f5f43a032730cf0c0d48adfcbae7b33",
    ),
    "C-Lion": Source(
        "kyleliang919/C-Optim",
        "c_lion.py",
        "2c0517c4db2e50b56d389ba4803eab1f4b3b8ae3",
        "5be246e816cf5fc5d02affacc71fb281175365c5d21aa13c433bc2854e712a4c",
    ),
}
CLASS_IN_FILE = {"C-AdamW": "AdamW", "C-Lion": "Lion"}
SHAPES = {"scalar": (), "vector": (3,), "matrix": (2, 5), "tensor": (3, 1, 4)}
# Gradients of very different sizes, so that a misplaced epsilon or a missing root shows at the ends.
SCALES = {"scalar": 1.0, "vector": 0.01, "matrix": 1.0, "tensor": 10.0}
STEPS = 50
RECORDED = (1, 2, 3, 5, 10, 20, 50)

# Sophia's tokens per batch, updates between two estimates, and the gradient on sampled labels as a share
# of the true one.
SOPHIA = {"tokens": 20, "every": 10, "sampled": 0.5}

# name, class, peak learning rate, arguments. `weight_decay` has the source's meaning: added to the
# gradient in SGD, Adagrad, RMSprop and Adam, decoupled in the others. An epsilon of 0.01 is as large as
# the vector's gradients, so a misplaced one would show.
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
    ("adan", "Adan", 0.05, {}),
    ("adan, weight decay", "Adan", 0.05, {"weight_decay": 0.5, "eps": 0.01}),
    ("adan, no_prox", "Adan", 0.05, {"weight_decay": 0.5, "no_prox": True, "foreach": False}),
    ("adan, restarted after 20", "Adan", 0.05, {"weight_decay": 0.1}),
    ("ademamix", "AdEMAMix", 0.02, {"weight_decay": 0.1}),
    (
        "ademamix, warm-up",
        "AdEMAMix",
        0.02,
        {"alpha": 8.0, "alpha_warmup": 30, "beta3_warmup": 40, "eps": 0.01},
    ),
    ("mars", "MARS", 0.02, {"lr_1d": 0.02, "weight_decay": 0.1, "weight_decay_1d": 0.1}),
    ("mars, everything", "MARS", 0.02, {"optimize_1d": True, "weight_decay": 0.1, "gamma": 0.1}),
    ("sophia_g", "SophiaG", 0.02, {}),
    ("sophia_g, rho", "SophiaG", 0.02, {"rho": 1.0, "betas": [0.9, 0.9], "weight_decay": 0.2}),
    ("schedule_free_adamw", "AdamWScheduleFreeReference", 0.02, {"weight_decay": 0.1}),
    (
        "schedule_free_adamw, all options",
        "AdamWScheduleFreeReference",
        0.02,
        {"r": 1.0, "weight_lr_power": 1.0, "inner_momentum": 0.9, "betas": [0.8, 0.95]},
    ),
    ("schedule_free_adamw, averaged", "AdamWScheduleFreeReference", 0.02, {"weight_decay": 0.1}),
    ("schedule_free_sgd", "SGDScheduleFreeReference", 0.05, {"weight_decay": 0.1}),
    # Unlike ours, its eps is not bias-corrected; one this small makes no difference.
    ("cautious_adamw", "C-AdamW", 0.02, {"foreach": False, "eps": 1e-16, "weight_decay": 0.1}),
    ("cautious_lion", "C-Lion", 0.02, {"weight_decay": 0.1}),
)


def inputs() -> dict:
    """Initial parameters, gradients and learning-rate factors, as short decimals that JSON preserves."""
    rng = np.random.default_rng(20261121)
    initial, gradients = {}, {}
    for name, shape in SHAPES.items():
        initial[name] = np.round(rng.normal(size=shape), 3)
        gradients[name] = np.round(rng.normal(size=(STEPS, *shape)), 3) * SCALES[name]
    gradients["vector"][:, 1] = 0.0  # one coordinate never gets a gradient
    gradients["matrix"][10:16] = 0.0  # one leaf gets none for a while
    gradients = {k: np.round(g, 6) for k, g in gradients.items()}
    factors = [round(min((t + 1) / 5, 0.5 + 0.5 * math.cos(0.06 * t)), 4) for t in range(STEPS)]
    return {
        "seed": 20261121,
        "initial": {k: v.tolist() for k, v in initial.items()},
        "gradients": {k: v.tolist() for k, v in gradients.items()},
        "learning_rate_factors": factors,
    }


def trajectory(name, optimizer_class, peak, arguments, data, dtype) -> dict:
    params = {k: torch.tensor(v, dtype=dtype) for k, v in data["initial"].items()}
    params = {k: torch.nn.Parameter(v) for k, v in params.items()}
    optimizer = optimizer_class(params.values(), lr=peak, **arguments)
    gradients = {k: torch.tensor(v, dtype=dtype) for k, v in data["gradients"].items()}
    is_sophia = "sophia" in name
    if "schedule_free" in name:
        optimizer.train()
    recorded = {}
    for step, factor in enumerate(data["learning_rate_factors"]):
        optimizer.param_groups[0]["lr"] = peak * factor
        for leaf, p in params.items():
            p.grad = gradients[leaf][step].clone()
        if "restarted" in name and step == 20:
            optimizer.restart_opt()
        optimizer.step(**({"bs": SOPHIA["tokens"]} if is_sophia else {}))
        if is_sophia and (step + 1) % SOPHIA["every"] == 0 and step + 1 < STEPS:
            # The estimate for the next batch, at the parameters that its step starts from.
            for leaf, p in params.items():
                p.grad = SOPHIA["sampled"] * gradients[leaf][step + 1]
            optimizer.update_hessian()
        if step + 1 in RECORDED:
            found = {k: p.detach() for k, p in params.items()}
            if "averaged" in name:
                found = {k: optimizer.state[p]["x"] for k, p in params.items()}
            # Nine digits distinguish all float32 numbers, seventeen all float64 numbers.
            digits = 9 if dtype == torch.float32 else 17
            recorded[step + 1] = {
                k: [float(f"{x:.{digits}g}") for x in p.flatten().tolist()]
                for k, p in found.items()
            }
    return recorded


def load(name: str, folder: Path) -> type[torch.optim.Optimizer]:
    """The authors' class, from their file."""
    source = AUTHORS[name]
    path = folder / Path(source.path).name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise SystemExit(f"{path} has sha256 {digest}, not that of the authors' file.")
    spec = importlib.util.spec_from_file_location(f"authors.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # C-Optim's file imports its own scheduler, for another code path.
    helpers = types.ModuleType("authors.opt_utils")
    for helper in ("AsyncTask", "AsyncRuntime", "to_local", "create_param_batches", "pad_batch"):
        setattr(helpers, helper, None)
    package = types.ModuleType("authors")
    package.__path__ = []
    modules = {"authors": package, "authors.opt_utils": helpers}
    # MARS and C-Optim compile functions that these cases do not call.
    compiling = mock.patch.object(torch, "compile", lambda f=None, **_: f or (lambda g: g))
    with mock.patch.dict(sys.modules, modules), compiling:
        spec.loader.exec_module(module)
    found = getattr(module, CLASS_IN_FILE.get(name, name))
    return functools.partial(found, no_deprecation_warning=True) if name == "C-AdamW" else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--authors", type=Path, required=True, help="folder of the authors' files")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    data = inputs()
    data["sophia"] = SOPHIA
    data["cases"] = {}
    torch_version = f"torch {torch.__version__}"
    for name, class_name, peak, arguments in CASES:
        if class_name in AUTHORS:
            file = AUTHORS[class_name]
            optimizer_class = load(class_name, args.authors)
            source = f"{file.repository} {file.path}"
            version = f"commit {file.commit[:12]}, {torch_version}"
        else:
            optimizer_class = getattr(torch.optim, class_name)
            source, version = f"torch.optim.{class_name}", torch_version
        data["cases"][name] = {
            "source": source,
            "version": version,
            "date": datetime.date.today().isoformat(),
            "class": class_name,
            "peak_learning_rate": peak,
            "arguments": arguments,
            "float64": trajectory(name, optimizer_class, peak, arguments, data, torch.float64),
            "float32": trajectory(name, optimizer_class, peak, arguments, data, torch.float32),
        }
    args.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {len(CASES)} cases")


if __name__ == "__main__":
    main()
