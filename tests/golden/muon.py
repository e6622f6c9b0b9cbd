"""Regenerates `muon.json`: 20 steps of Muon and its variants, run by their authors' own code.

Run it in a separate environment with copies of the authors' files, because ravine needs no PyTorch:

    python3 -m venv ../torch-venv && ../torch-venv/bin/pip install torch==2.13.0 numpy
    ../torch-venv/bin/python tests/golden/muon.py --keller muon.py --moonlight toy_train.py \\
        --normuon normuon.py --adamuon adamuon.py

    option       repository on GitHub    path                               commit
    --keller     KellerJordan/Muon       muon.py                            857d1adc159e
    --moonlight  MoonshotAI/Moonlight    examples/toy_train.py              c2ad5b20c605
    --normuon    zichongli5/NorMuon      normuon.py                         d45c9a4280d7
    --adamuon    Chongjie-Si/AdaMuon     gpt2/models/optimizers/adamuon.py  369f0b3bd9d9

`SOURCES` has the full commit hashes and the SHA-256 of the files. Only the optimizer and its functions
are compiled from each file: no training script runs, and `torch.compile` is removed. Two more cases
use `torch.optim.Muon`. Every case runs twice, always with float32 parameters and gradients:

`bfloat16`: as published, Newton–Schulz in bfloat16, on the CPU.
`float32`: `torch.Tensor.bfloat16` is patched to return a float32 copy, and `torch.bfloat16` is replaced
by `torch.float32`. The script checks that no operation returns any other type.

Matrices are out × in, as torch stores weights. Tests use `inputs` and `unpack`, without PyTorch.
"""

import argparse
import ast
import base64
import contextlib
import datetime
import hashlib
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

try:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # the parts used by the tests need only numpy
    torch, TorchDispatchMode = None, object

# With this seed, no |u| except the zeros is below 9e-6 rms(u), so AdaMuon's signs are certain.
SEED = 20261121
STEPS = 20
RECORDED = (1, 2, 5, 10, 20)
SHAPES = {"tall": (48, 16), "wide": (16, 40), "square": (24, 24)}
# Tall gradients are so small that the epsilon of Newton–Schulz matters.
SCALES = {"tall": 1e-4, "wide": 1.0, "square": 1e2}
LEARNING_RATES = [round(0.02 * min((t + 1) / 4, math.cos(0.07 * t) ** 2), 6) for t in range(STEPS)]

FUNCTIONS = ("zeropower_via_newtonschulz5", "muon_update", "normuon_update")
# repository, path, optimizer, commit, SHA-256 of the file
SOURCES = {
    "keller": (
        *("KellerJordan/Muon", "muon.py", "SingleDeviceMuon"),
        "857d1adc159e098212f828d927460782d3da59e9",
        "1eece0b562f159e88f3a65da9b6ee8d0ab2dd647cf25c88e355d4f262e796e66",
    ),
    "moonlight": (
        *("MoonshotAI/Moonlight", "examples/toy_train.py", "Muon"),
        "c2ad5b20c605086526a179d36901bfc41b52b44b",
        "8df3ec6e2f2cd5af8aee59ffb48b2219f394da6f049d95d881c66a6d13d00874",
    ),
    "normuon": (
        *("zichongli5/NorMuon", "normuon.py", "SingleDeviceNorMuon"),
        "d45c9a4280d758e2cf0b2b8333765d040e953937",
        "a9bd18a0eaea75864610049fb21c655a87284e16e267dbe565e7d5c70aec242a",
    ),
    "adamuon": (
        *("Chongjie-Si/AdaMuon", "gpt2/models/optimizers/adamuon.py", "AdaMuon"),
        "369f0b3bd9d97f82bb8ba81664207ac513e233b0",
        "367ffdab51f357ca16935fab13964ee6b363179973b40ce4e9f468aef0532240",
    ),
}

NOTATION = (
    "NS(x): transpose if rows > columns; x = x / (norm(x) + ns_eps), Frobenius; ns_steps times "
    "A = x x', B = b A + (c A) A, x = a x + B x with (a, b, c) = (3.4445, -4.7750, 2.0315); "
    "transpose back. Buffers start at 0, lr is that of the step, m and u are float32."
)
LERPS = "m = b m + (1 - b) g; u = (1 - b) g + b m, both by lerp, b = momentum; "
DECAY = "p *= 1 - lr wd; "
COMMON, NS = {"weight_decay": 0.1, "momentum": 0.95}, {"nesterov": True, "ns_steps": 5}
# name: (source, arguments, values fixed in the code, formula and remarks)
CASES = {
    "keller": (
        *("keller", COMMON, {**NS, "ns_eps": 1e-7}),
        f"{LERPS}U = NS(u) * max(1, rows / columns)**0.5; {DECAY}p -= lr U. "
        "The factor is applied to U, in bfloat16 as published.",
    ),
    "moonlight": (
        *("moonlight", {"wd": 0.1, "momentum": 0.95, **NS}, {"ns_eps": 1e-7}),
        f"m = b m + g; u = g + b m; {DECAY}p -= (lr 0.2 max(rows, columns)**0.5) NS(u). "
        "m is a sum, 20 times that of the others: ns_eps weighs 20 times less.",
    ),
    "torch, original": (
        *("torch", {**COMMON, **NS, "eps": 1e-7, "adjust_lr_fn": "original"}, {}),
        f"{LERPS}{DECAY}p -= (lr max(1, rows / columns)**0.5) NS(u). NS divides by max(norm, eps), "
        "not norm + eps. Its products are addmm: b A + c (A A) and a x + B x are rounded to "
        "bfloat16 once each, in the other files each product and each sum is.",
    ),
    "torch, match_rms_adamw": (
        *("torch", {**COMMON, **NS, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"}, {}),
        "As 'torch, original', but p -= (lr 0.2 max(rows, columns)**0.5) NS(u).",
    ),
    "normuon": (
        # The default beta2 of 0.95 would not reveal a swap with momentum.
        *("normuon", {**COMMON, "beta2": 0.9}, {**NS, "ns_eps": 1e-7, "eps": 1e-10}),
        f"{LERPS}O = NS(u); v = lerp(v, mean(O O over columns), 1 - beta2), one by row, "
        "uncorrected; n = norm(O); O = O * (1 / (sqrt(v) + eps)); O = O * (n / (norm(O) + eps)); "
        f"U = O * max(1, rows / columns)**0.5; {DECAY}p -= lr U. Without a gradient p moves by "
        "momentum but does not decay. With float32 parameters this commit raises, as lerp_ takes "
        "no bfloat16 mean into a float32 v (issue 7, mended by pull request 10): for the bfloat16 "
        "variant the output of NS, not its inside, is cast to float32 here.",
    ),
    "adamuon": (
        *("adamuon", {**COMMON, **NS, "eps": 1e-8, "rank": 0, "world_size": 1}, {"ns_eps": 1e-7}),
        f"{LERPS}O = NS(sign(u)), sign(0) = 0; v = b v + (1 - b) O O, elementwise, uncorrected; "
        "O = O / (sqrt(v) + eps); U = O * (0.2 (rows columns)**0.5 / (norm(O) + eps)); "
        f"{DECAY}p -= lr U. The first O is sign(O) / sqrt(1 - b). v, O, the factor and U are "
        "bfloat16 too as published. Here the buffer for the other processes is on the CPU, not on "
        "CUDA, and all_gather_into_tensor copies, there being one process.",
    ),
}


def inputs() -> tuple[dict, dict]:
    """Initial parameters and gradients [step, row, column] by leaf, float32, identical on all machines.

    Gradients are sums of outer products of decreasing size, some of which change at every step. They are
    computed from products and sums of single numbers, not by BLAS, whose rounding differs by machine.
    """
    rng = np.random.default_rng(SEED)
    initial, gradients = {}, {}
    for name, (rows, columns) in SHAPES.items():
        rank = min(rows, columns)
        sizes = np.cumprod(np.full(rank, 0.75)) * SCALES[name]
        initial[name] = np.round(rng.standard_normal((rows, columns)), 3).astype(np.float32)
        left, right = rng.standard_normal((rank, rows)), rng.standard_normal((rank, columns))
        sums = np.zeros((STEPS, rows, columns))
        for t in range(STEPS):
            now_left = left + 0.5 * rng.standard_normal(left.shape)
            now_right = right + 0.5 * rng.standard_normal(right.shape)
            for k in range(rank):
                outer = np.multiply.outer(now_left[k], now_right[k])
                sums[t] += outer * (sizes[k] * 2.0 ** (t % 3 - 1))
        gradients[name] = sums.astype(np.float32)
    gradients["tall"][:, 5] = 0.0  # an output that never gets a gradient
    return initial, gradients


def flat(leaves: dict) -> np.ndarray:
    """All leaves in the order of `SHAPES`, each one row by row, as one float32 vector."""
    return np.concatenate([np.ravel(leaves[name]) for name in SHAPES]).astype("<f4")


def pack(values: np.ndarray, reference: np.ndarray) -> str:
    """Float32 numbers without loss: the differences between their bits and a reference, compressed."""
    steps = values.view("<i4") - reference.view("<i4")
    folded = (steps << 1) ^ (steps >> 31)  # sign bit last: small differences have high bits of 0
    return base64.b85encode(zlib.compress(folded.reshape(-1, 1).view("u1").T.tobytes(), 9)).decode()


def unpack(text: str, reference: np.ndarray) -> np.ndarray:
    """The [record, parameter] array passed to `pack`, float32, in the order of `flat`.

    The reference of the float32 variant is `flat(initial)`, and that variant is the reference of the
    bfloat16 one. For the outputs of Newton–Schulz, the reference is zeros.
    """
    planes = np.frombuffer(zlib.decompress(base64.b85decode(text)), "u1").reshape(4, -1)
    folded = np.ascontiguousarray(planes.T).view("<u4").reshape(-1, reference.shape[-1])
    steps = (folded >> 1).astype("<i4") ^ -(folded & 1).astype("<i4")
    return (reference.view("<i4") + steps).view("<f4")


def load(source: str, path: Path) -> tuple:
    """Newton–Schulz and the optimizer from an authors' file, whose SHA-256 is checked."""
    repository, _, optimizer, _, sha256 = SOURCES[source]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{path} is not the file of {repository}: its sha256 is not {sha256}.")
    tree = ast.parse(content.decode().replace('device="cuda"', 'device="cpu"'))
    tree.body = [n for n in tree.body if getattr(n, "name", None) in (*FUNCTIONS, optimizer)]
    for node in tree.body:
        node.decorator_list = []  # removes torch.compile

    def all_gather_into_tensor(output, tensor, async_op):
        output.copy_(tensor)
        return SimpleNamespace(wait=lambda: None)

    dist = SimpleNamespace(all_gather_into_tensor=all_gather_into_tensor)
    scope = {"torch": torch, "Tensor": torch.Tensor, "math": math, "dist": dist}
    exec(compile(tree, str(path), "exec"), scope)
    newton_schulz, make = scope[FUNCTIONS[0]], scope[optimizer]
    if source == "normuon":
        scope[FUNCTIONS[0]] = lambda g, steps: newton_schulz(g, steps).to(g.dtype)
    if source == "moonlight":
        return newton_schulz, lambda params, **rest: make(muon_params=params, **rest)
    return newton_schulz, make


class Types(TorchDispatchMode):
    """Collects the types that operations return: (whether it is a matrix product, type)."""

    seen: set

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            product = function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
            self.seen.add((product, result.dtype))
        return result


@contextlib.contextmanager
def variant(name: str):
    """Runs its body in a variant, then checks the types of the results."""
    types, kind, float32 = Types(), getattr(torch, name), torch.float32
    types.seen = set()
    with contextlib.ExitStack() as stack:
        if name == "float32":
            copy = lambda x: x.to(float32, copy=True)
            stack.enter_context(mock.patch.object(torch.Tensor, "bfloat16", copy))
            stack.enter_context(mock.patch.object(torch, "bfloat16", float32))
        stack.enter_context(types)
        yield
    assert {dtype for product, dtype in types.seen if product} == {kind}, types.seen
    assert kind != float32 or {dtype for _, dtype in types.seen} == {kind}, types.seen


def trajectory(make, arguments: dict, initial: dict, gradients: dict) -> np.ndarray:
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in initial.items()}
    optimizer = make(list(params.values()), lr=LEARNING_RATES[0], **arguments)
    recorded = []
    for step, learning_rate in enumerate(LEARNING_RATES):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name][step])  # a copy, because some write to it
        optimizer.step()
        if step + 1 in RECORDED:
            recorded.append(flat({k: p.detach().numpy() for k, p in params.items()}))
    return np.stack(recorded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for source, (repository, path, *_) in SOURCES.items():
        parser.add_argument(f"--{source}", type=Path, required=True, help=f"{repository} {path}")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = {source: load(source, getattr(args, source)) for source in SOURCES}
    loaded["torch"] = (None, torch.optim.Muon)
    sha256 = hashlib.sha256(Path(torch.optim._muon.__file__).read_bytes()).hexdigest()
    torch_source = ("pytorch/pytorch", "torch/optim/_muon.py", "Muon")
    origins = {**SOURCES, "torch": (*torch_source, torch.version.git_version, sha256)}
    initial, gradients = inputs()
    start = flat(initial)
    digest = lambda leaves: hashlib.sha256(flat(leaves).tobytes()).hexdigest()
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    data = about | {
        "seed": SEED,
        "shapes": SHAPES,
        "recorded": RECORDED,
        "learning_rates": LEARNING_RATES,
        "sha256_of_inputs": {"initial": digest(initial), "gradients": digest(gradients)},
        "notation": NOTATION,
        "newton_schulz": {"of": "keller", "ns_steps": 5, "input": "gradients of the first step"},
        "cases": {},
    }
    for name in ("float32", "bfloat16"):
        with variant(name):
            outputs = {k: loaded["keller"][0](torch.tensor(g[0]), 5) for k, g in gradients.items()}
        outputs = flat({k: x.float().numpy() for k, x in outputs.items()})
        data["newton_schulz"][name] = pack(outputs[None], np.zeros_like(start))
    for case, (source, arguments, fixed, remarks) in CASES.items():
        keys = ("repository", "path", "class", "commit", "sha256")
        runs = {}
        for name in ("float32", "bfloat16"):
            with variant(name):
                runs[name] = trajectory(loaded[source][1], arguments, initial, gradients)
        case_data = dict(zip(keys, origins[source], strict=True)) | about
        case_data |= {"arguments": arguments, "fixed_by_the_code": fixed, "remarks": remarks}
        for name, reference in (("float32", start), ("bfloat16", runs["float32"])):
            case_data[name] = pack(runs[name], reference)
            assert np.array_equal(unpack(case_data[name], reference), runs[name])
        data["cases"][case] = case_data
    args.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {len(CASES)} cases")


if __name__ == "__main__":
    main()
