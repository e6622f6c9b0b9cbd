"""Regenerates `shampoo.json`: 20 steps of Shampoo, SOAP and KL-Shampoo, run by their authors' code.

Run it in a separate environment with copies of the authors' files, because ravine needs no PyTorch:

    python3 -m venv ../torch-venv && ../torch-venv/bin/pip install torch==2.13.0 numpy
    ../torch-venv/bin/python tests/golden/shampoo.py --meta optimizers --soap soap.py --kl kl_opt.py

    option  repository on GitHub         path                 commit
    --meta  facebookresearch/optimizers  distributed_shampoo  f60660661194
    --soap  nikhilvyas/SOAP              soap.py              a1e553530fde
    --kl    yorkerlin/KL-Methods         optim/kl_opt.py      a02e62215563

`--meta` is the checkout, the folder that contains the package. `SOURCES` has the full commit hashes
and the SHA-256 of the files; for the package, it is that of the output of `sha256sum` for its .py files,
sorted by path. Everything runs in float32 on one thread, without `torch.compile`; KL-Methods has an
option for the type of its state, with bfloat16 as the default.

What the authors' code does and the papers do not mention:

Meta without grafting: before `start_preconditioning_step` the direction is the filtered gradient,
bias corrected, since the inverse factors start as identities (with grafting it is that of the
grafted method). Each step updates the statistics, then the roots, then the direction. Roots are
computed at the start step, then when the step is a multiple of `precondition_frequency`.
Meta's KL-Shampoo: factor matrices start as zeros and inverse factors as identities. A step
updates all statistics with the previous inverse factors, then the roots (if due) from the new
statistics, then the direction with the new roots. Statistics are not divided by the dimension; up
to the start step they are those of Shampoo.
SOAP and KL-Methods: the first step computes the statistics and their eigenvectors, and moves nothing.
The eigenvectors are those of the products of one gradient: if they lack more than one rank, LAPACK
chooses the basis of the null space, and so the trajectory. With our shapes at most one is missing.

`sensitivity` of a case is the largest change of a leaf's path, relative to the length of its path
in the largest entry, when each gradient is multiplied by 1 + 1e-6 n with normal n; it shows how much
rounding matters. Tests use `inputs` and `unpack`, without PyTorch.
"""

import argparse
import base64
import contextlib
import datetime
import hashlib
import importlib
import io
import json
import math
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np

try:
    import torch
except ImportError:  # the parts used by the tests need only numpy
    torch = None

SEED = 20261121
STEPS = 20
RECORDED = (1, 2, 5, 10, 20)
LEARNING_RATES = [round(0.02 * min((t + 1) / 4, math.cos(0.07 * t) ** 2), 6) for t in range(STEPS)]
# The leaves of each kind of input, and the factor for the gradients of each leaf.
SHAPES = {
    "meta": {"a": (8, 4), "b": (3, 4, 2), "c": (4,)},
    "meta_kl": {"a": (8, 4), "d": (4, 4)},
    "soap": {"a": (5, 4), "b": (3, 5, 2), "c": (2,)},
    "kl": {"a": (5, 4), "b": (4, 5), "d": (4, 4), "e": (3, 5, 2)},
}
SCALES = {"a": 1.0, "b": 1e-2, "c": 3.0, "d": 1e-2, "e": 3.0}

# repository, path, class, commit, SHA-256
SOURCES = {
    "meta": (
        *("facebookresearch/optimizers", "distributed_shampoo", "DistributedShampoo"),
        "f60660661194de26d3ee78bae6d15820ff8e583d",
        "a169cc8faf4773c9b8585b073897fb3b61b20edcf2f9dcb627c09f80b14c6530",
    ),
    "soap": (
        *("nikhilvyas/SOAP", "soap.py", "SOAP"),
        "a1e553530fde97d0e6b307d7c82ac6d38b072340",
        "9e9021335ad02371584622fa256e73fe75f3eb74446a8d8a216e956534148f6b",
    ),
    "kl": (
        *("yorkerlin/KL-Methods", "optim/kl_opt.py", "KLOpt"),
        "a02e6221556301cf84f9607c73f327910afb2b95",
        "442d743e516f7ed453e60d0502460ffdc744b8e1708dbdac56d4aef0929a9c1a",
    ),
}

EIGEN = {"class": "EigenConfig"}
ADAM = {"class": "AdamPreconditionerConfig", "beta2": 0.99, "epsilon": 1e-8}
ADAGRAD = {"class": "AdaGradPreconditionerConfig", "epsilon": 1e-8}
ROOTS = {"class": "RootInvShampooPreconditionerConfig", "amortized_computation_config": EIGEN}
META = {
    "betas": [0.9, 0.99],
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_preconditioner_dim": 4,
    "precondition_frequency": 2,
    "start_preconditioning_step": 6,
    "use_bias_correction": True,
    "iterate_averaging_config": None,
    "grafting_config": None,
    "preconditioner_config": ROOTS,
    # dimensions are not merged
    "distributed_config": {
        "class": "SingleDeviceDistributedConfig",
        "target_parameter_dimensionality": "inf",
    },
}
NEWTON = {**ROOTS, "amortized_computation_config": {"class": "CoupledNewtonConfig"}}
KL_ROOTS = {
    **ROOTS,
    "class": "RootInvKLShampooPreconditionerConfig",
    "inverse_exponent_override": {"2": 0.5},
}
SOAP = {
    "betas": [0.95, 0.95],
    "shampoo_beta": -1,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "precondition_frequency": 3,
    "max_precond_dim": 10000,
    "merge_dims": False,
    "precondition_1d": False,
    "normalize_grads": False,
    "correct_bias": True,
}
KL = {
    "betas": [0.9, 0.98],
    "shampoo_beta": -1,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "precondition_frequency": 3,
    "normalize_grads": False,
    "init_factor": 0.1,
    "using_damping": False,
    "using_clamping": True,
    "max_clamp_value": 4000,
    "cast_dtype": "float32",
}
# name: (source, inputs, arguments, remarks)
CASES = {
    "meta_eigh": ("meta", "meta", META, "No grafting: steps 1 to 5 are those of SGD with momentum"),
    "meta_newton": ("meta", "meta", {**META, "preconditioner_config": NEWTON}, "Coupled Newton"),
    "meta_adam_graft": ("meta", "meta", {**META, "grafting_config": ADAM}, "By block"),
    "meta_adamw": (
        *("meta", "meta", {**META, "grafting_config": ADAM, "weight_decay": 0.1}),
        "Decoupled: added to the direction after grafting, in steps 1 to 5 too",
    ),
    "meta_kl": (
        *("meta", "meta_kl", {**META, "preconditioner_config": KL_ROOTS}),
        "Inverse square roots of both factors, no grafting",
    ),
    "meta_sum": (
        *("meta", "meta", {**META, "betas": [0.9, 1.0], "grafting_config": ADAGRAD}),
        "Sums of statistics, without bias correction; the momentum has it",
    ),
    "soap": ("soap", "soap", SOAP, "The leaf of one dimension is in its own basis, as in Adam"),
    "soap_one_sided": (
        *("soap", "soap", {**SOAP, "max_precond_dim": 4, "precondition_1d": True}),
        "Dimensions of 5 are left as they are",
    ),
    "kl_shampoo": ("kl", "kl", {**KL, "using_klsoap": False}, "No bias correction"),
    "kl_shampoo_clamped": (
        *("kl", "kl", {**KL, "using_klsoap": False, "init_factor": 0.011}),
        "Eigenvalues of the leaves of small gradients come down to the clamp, 10**-2",
    ),
    "kl_soap": ("kl", "kl", {**KL, "using_klsoap": True}, "No bias correction"),
}


def inputs(name: str) -> tuple[dict, dict]:
    """Initial parameters and gradients [step, ...] by leaf, float32, for a key of `SHAPES`.

    The gradient of every step is standard normal, times the factor of the leaf.
    """
    initial, gradients = {}, {}
    for leaf, shape in SHAPES[name].items():
        rng = np.random.default_rng([SEED, list(SHAPES).index(name), ord(leaf)])
        initial[leaf] = np.round(rng.standard_normal(shape), 3).astype(np.float32)
        normal = np.round(rng.standard_normal((STEPS, *shape)), 6)
        gradients[leaf] = (normal * SCALES[leaf]).astype(np.float32)
    return initial, gradients


def pack(values: np.ndarray, reference: np.ndarray) -> str:
    """Float32 numbers without loss: the differences between their bits and a reference, compressed."""
    steps = values.view("<i4") - reference.view("<i4")
    folded = (steps << 1) ^ (steps >> 31)  # sign bit last: small differences have high bits of 0
    return base64.b85encode(zlib.compress(folded.reshape(-1, 1).view("u1").T.tobytes(), 9)).decode()


def unpack(text: str, reference: np.ndarray) -> np.ndarray:
    """The [record, ...] array passed to `pack`, float32; the reference is the initial leaf."""
    planes = np.frombuffer(zlib.decompress(base64.b85decode(text)), "u1").reshape(4, -1)
    folded = np.ascontiguousarray(planes.T).view("<u4").reshape(-1, *reference.shape)
    steps = (folded >> 1).astype("<i4") ^ -(folded & 1).astype("<i4")
    return (reference.view("<i4") + steps).view("<f4")


def check(source: str, path: Path) -> None:
    """Raises an error unless a file, or the .py files of a package, match the SHA-256 in `SOURCES`."""
    repository, name, _, commit, sha256 = SOURCES[source]
    if source == "meta":
        files = sorted((path / name).rglob("*.py"), key=lambda file: file.as_posix())
        digests = [(hashlib.sha256(f.read_bytes()).hexdigest(), f.relative_to(path)) for f in files]
        content = "".join(f"{digest}  {file.as_posix()}\n" for digest, file in digests).encode()
    else:
        content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise SystemExit(f"{path}: not {repository} at {commit}: {found} is not {sha256}.")


def load(source: str, path: Path):
    """A builder of the authors' optimizer, from parameters and plain arguments of `CASES`."""
    check(source, path)
    name = SOURCES[source][2]
    if source != "meta":
        scope = {}
        with mock.patch.object(torch, "compile", lambda function: function):
            exec(compile(path.read_text(), str(path), "exec"), scope)

        def make_plain(params, cast_dtype=None, **arguments):
            if cast_dtype:
                arguments["cast_dtype"] = getattr(torch, cast_dtype)
            with contextlib.redirect_stdout(io.StringIO()):
                return scope[name](params, **arguments)

        return make_plain
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(path))
    package = importlib.import_module("distributed_shampoo.distributed_shampoo")
    types = importlib.import_module("distributed_shampoo.shampoo_types")
    matrices = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")

    def build(value):
        if value == "inf":
            return math.inf
        if not isinstance(value, dict):
            return value
        entries = {int(k) if k.isdigit() else k: build(v) for k, v in value.items()}
        if "class" not in entries:
            return entries
        config = entries.pop("class")
        return (getattr(types, config, None) or getattr(matrices, config))(**entries)

    def make(params, **arguments):
        arguments = {k: build(v) for k, v in arguments.items()}
        return getattr(package, name)(params, **arguments)

    return make


def trajectory(make, arguments: dict, initial: dict, gradients: dict) -> dict:
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in initial.items()}
    optimizer = make(list(params.values()), lr=LEARNING_RATES[0], **arguments)
    recorded = {k: [] for k in params}
    for step, learning_rate in enumerate(LEARNING_RATES):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name][step])
        optimizer.step()
        for name, p in params.items():
            assert p.dtype == torch.float32
            assert torch.isfinite(p).all()
            if step + 1 in RECORDED:
                recorded[name].append(p.detach().numpy().copy())
    return {k: np.stack(v) for k, v in recorded.items()}


def sensitivity(make, arguments: dict, initial: dict, gradients: dict, run: dict) -> float:
    rng = np.random.default_rng(SEED)
    changed = {
        k: (g * (1 + 1e-6 * rng.standard_normal(g.shape))).astype(np.float32)
        for k, g in gradients.items()
    }
    other = trajectory(make, arguments, initial, changed)
    ratios = [np.abs(other[k] - run[k]).max() / np.abs(run[k] - initial[k]).max() for k in run]
    return float(f"{max(ratios):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for source, (repository, path, *_) in SOURCES.items():
        parser.add_argument(f"--{source}", type=Path, required=True, help=f"{repository} {path}")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = {source: load(source, getattr(args, source)) for source in SOURCES}
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    data = about | {
        "seed": SEED,
        "recorded": RECORDED,
        "learning_rates": LEARNING_RATES,
        "shapes": SHAPES,
        "scales": SCALES,
        "sha256_of_inputs": {},
        "cases": {},
    }
    for name in SHAPES:
        leaves = [values for part in inputs(name) for values in part.values()]
        content = b"".join(values.astype("<f4").tobytes() for values in leaves)
        data["sha256_of_inputs"][name] = hashlib.sha256(content).hexdigest()
    for case, (source, name, arguments, remarks) in CASES.items():
        initial, gradients = inputs(name)
        run = trajectory(loaded[source], arguments, initial, gradients)
        keys = ("repository", "path", "class", "commit", "sha256")
        case_data = dict(zip(keys, SOURCES[source], strict=True)) | about
        case_data |= {"inputs": name, "arguments": arguments, "remarks": remarks}
        case_data["sensitivity"] = sensitivity(loaded[source], arguments, initial, gradients, run)
        case_data["parameters"] = {k: pack(v, initial[k]) for k, v in run.items()}
        for leaf, text in case_data["parameters"].items():
            assert np.array_equal(unpack(text, initial[leaf]), run[leaf])
        data["cases"][case] = case_data
        print(f"{case}: sensitivity {case_data['sensitivity']:.1e}")
    args.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {len(CASES)} cases")


if __name__ == "__main__":
    main()
