"""A fast subset of the benchmarks: ratios against committed bounds, so that no regression goes
unnoticed.

    python benchmarks guard              # about a minute; status 1 if a bound is exceeded
    python benchmarks guard --record WHY # writes the measurements into the history of guard.json

Everything is a ratio of two measurements in one process, taken in turn: processor time, since other
load on the machine affects it less, or memory from XLA's analysis, without running anything. A bound is
the value measured when it was set, times 2 for processor time (a busy machine alone accounts for 1.4),
and times 1.1 for memory. What exceeds its bound is measured once more, and fails if it does so again: a
step of a few milliseconds was once seen at 1.8 times its ratio.
"""

import argparse
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ravine
from measure import Contender
from ravine.optimizers.roles import IN_OUT
from ravine.stability import fused_cross_entropy, skip_step

FILE = Path(__file__).with_name("guard.json")
MARGIN = {"time": 2.0, "memory": 1.1}


def contender(tx: optax.GradientTransformation, leaves: int, side: int) -> Contender:
    """An optimizer on equal leaves of normal numbers, timed by the processor's clock."""
    rng = np.random.default_rng(0)
    shape = (side, side)
    tree = {f"{at:03}": rng.normal(size=shape).astype(np.float32) for at in range(leaves)}
    return Contender(tx, tree, time.process_time)


def in_turn(one: Callable[[], float], other: Callable[[], float], times: int) -> float:
    """The median of the ratios of neighbours."""
    return statistics.median(one() / other() for _ in range(times))


def against(
    ours: optax.GradientTransformation, theirs: optax.GradientTransformation, leaves: int, side: int
) -> dict[str, float]:
    """Ratios of compile time, step time and temporary memory."""
    a, b = (contender(tx, leaves, side) for tx in (ours, theirs))
    compiled = in_turn(a.compile, b.compile, 3)
    in_turn(a.step, b.step, 2)
    memory = a.temporary_megabytes / b.temporary_megabytes
    return {"compile": compiled, "step": in_turn(a.step, b.step, 15), "memory": memory}


def growth(tx: optax.GradientTransformation) -> float:
    """Compile time of 48 equal leaves over that of 6."""
    many, few = (contender(tx, leaves, 64) for leaves in (48, 6))
    return in_turn(many.compile, few.compile, 3)


def loss_memory() -> float:
    """Temporary memory of the fused loss and its gradient over that of logits and Optax's."""
    hidden = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    kernel = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def naive(hidden: Any, kernel: Any, labels: Any) -> Any:
        found = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
        return jnp.mean(found)

    def fused(hidden: Any, kernel: Any, labels: Any) -> Any:
        return jnp.mean(fused_cross_entropy(hidden, kernel, labels)[0])

    temporary = [
        jax.jit(jax.grad(loss, (0, 1)))
        .lower(hidden, kernel, labels)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for loss in (fused, naive)
    ]
    return temporary[0] / temporary[1]


def measured() -> dict[str, tuple[str, float]]:
    """For each name, the quantity behind the ratio, and its value."""
    rules = [(".*", "matrix", IN_OUT)]
    adamw = against(ravine.adamw(1e-3), optax.adamw(1e-3), 40, 256)
    muon = against(ravine.muon(0.02, rules=rules), optax.contrib.muon(0.02), 40, 128)
    guarded = against(skip_step(ravine.adamw(1e-3)), optax.adamw(1e-3), 10, 512)
    blocks = functools.partial(ravine.Blocks, size=64)
    return {
        "adamw over Optax's: compile": ("time", adamw["compile"]),
        "adamw over Optax's: step": ("time", adamw["step"]),
        "muon over Optax's: compile": ("time", muon["compile"]),
        "muon over Optax's: step": ("time", muon["step"]),
        "muon over Optax's: temporary memory": ("memory", muon["memory"]),
        "skip_step around adamw over Optax's adamw: step": ("time", guarded["step"]),
        "shampoo: compile 48 leaves over 6": (
            "time",
            growth(ravine.scale_by_shampoo(blocks=blocks())),
        ),
        "soap: compile 48 leaves over 6": ("time", growth(ravine.scale_by_soap(blocks=blocks()))),
        "muon: compile 48 leaves over 6": ("time", growth(ravine.scale_by_muon())),
        "fused loss over logits: temporary memory": ("memory", loss_memory()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", metavar="WHY", help="set new bounds, and say why")
    why = parser.parse_args().record
    jax.config.update("jax_enable_compilation_cache", False)
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    passed = report(rows, measured(), why)
    if passed and not why:
        print("again, as something else may have run beside it:", flush=True)
        passed = [name for name in report(rows, measured(), None) if name in passed]
    if why:
        FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if passed:
        sys.exit(f"past the bound of {FILE.name}: {'; '.join(passed)}.")


def report(rows: dict[str, Any], found: dict[str, tuple[str, float]], why: str | None) -> list[str]:
    """The names of those past their bounds; with a reason, sets new ones in `rows`."""
    passed = []
    for name, (kind, value) in found.items():
        if why:
            bound = round(value * MARGIN[kind], 3)
            entry = {"date": str(datetime.date.today()), "measured": round(value, 3)}
            entry |= {"bound": bound, "why": why}
            row = rows.setdefault(name, {"bound": bound, "history": []})
            row["bound"] = bound
            row["history"].append(entry)
        bound = rows[name]["bound"] if name in rows else float("nan")
        print(f"{name:<50} {value:7.3f}   bound {bound:.3f}", flush=True)
        if not value <= bound:
            passed.append(name)
    return passed


if __name__ == "__main__":
    main()
