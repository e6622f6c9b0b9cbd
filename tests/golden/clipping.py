"""Regenerates `clipping.json`: ZClip and SPAM from their authors' own code, in PyTorch.

    python3 -m venv ../torch-venv && ../torch-venv/bin/pip install torch==2.13.0 numpy
    ../torch-venv/bin/python tests/golden/clipping.py --authors FOLDER

FOLDER holds `zclip.py` and `SPAM.py` as listed in AUTHORS. The result contains ZClip's clipped gradients
and SPAM's parameters, which start at zero with a learning rate of one; all are in float64. The authors
of StableAdamW published no code.
"""

import argparse
import datetime
import hashlib
import json
import runpy
import warnings
from pathlib import Path

import numpy as np
import torch

AUTHORS = {
    "zclip.py": {
        "source": "bluorion-com/ZClip zclip/zclip.py",
        "commit": "584ce4f5a4aabab59e7df1dbaffc26a44df39dc1",
        "sha256": "c28177c4fd32a32d63668cda49f76c9274d57858c1d6a9fecb7c511e50418ad8",
    },
    "SPAM.py": {
        "source": "TianjinYellow/SPAM-Optimizer galore_torch/SPAM.py",
        "commit": "e8185fbe695fdc449953b4a1f96121df5bf0d268",
        "sha256": "423ed9839aa76117ea81f0ba6bf50b0178c70ddd951461a2116f789c40c9c42b",
    },
}
SHAPES = {"vector": (3,), "matrix": (2, 5)}
STEPS = 40
# Spikes in warm-up, of every size, two in a row, and just after a reset of SPAM's moments.
SPIKES = {2: 20.0, 12: 9.0, 13: 2.5, 20: 1e3, 25: 30.0, 30: 1e4}
ZCLIP = {"alpha": 0.97, "z_thresh": 2.5, "max_grad_norm": 6.0, "eps": 1e-6, "warmup_steps": 8}
SPAM = {
    "lr": 1.0,
    "betas": (0.9, 0.99),
    "eps": 1e-12,
    "threshold": 50,
    "DeltaT": 12,
    "warmup_steps": 5,
    "grad_accu_steps": 4,
}


def gradients() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {k: SPIKES.get(step, 1.0) * rng.normal(size=shape) for k, shape in SHAPES.items()}
        for step in range(STEPS)
    ]


def parameters() -> dict[str, torch.nn.Parameter]:
    return {
        k: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for k, shape in SHAPES.items()
    }


def set_gradients(params: dict[str, torch.nn.Parameter], grads: dict[str, np.ndarray]) -> None:
    for name, grad in grads.items():
        params[name].grad = torch.tensor(grad)


def zclip(authors: dict) -> list[dict[str, list]]:
    clip, params, rows = authors["ZClip"](**ZCLIP), parameters(), []
    model = torch.nn.ParameterDict(params)
    for grads in gradients():
        set_gradients(params, grads)
        clip.step(model)
        rows.append({k: p.grad.tolist() for k, p in params.items()})
    return rows


def spam(authors: dict) -> list[dict[str, list]]:
    params, rows = parameters(), []
    optimizer = authors["AdamW"](list(params.values()), **SPAM)
    for grads in gradients():
        set_gradients(params, grads)
        optimizer.step()
        rows.append({k: p.tolist() for k, p in params.items()})
    return rows


def load(folder: Path, name: str) -> dict:
    path = folder / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != AUTHORS[name]["sha256"]:
        raise SystemExit(f"{path} has sha256 {digest}, not that of the authors' file.")
    return runpy.run_path(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "This implementation of AdamW", FutureWarning)
    data = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "authors": AUTHORS,
        "gradients": [{k: g.tolist() for k, g in grads.items()} for grads in gradients()],
        "zclip": {"arguments": ZCLIP, "clipped": zclip(load(args.authors, "zclip.py"))},
        "spam": {"arguments": SPAM, "parameters": spam(load(args.authors, "SPAM.py"))},
    }
    args.out.write_text(json.dumps(data, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
