"""A fast subset of the benchmarks: ratios against committed bounds, so that no change loses them unseen.

    python benchmarks guard              # about a minute; status 1 where a bound is passed
    python benchmarks guard --record WHY # writes what was measured into the history of guard.json

Everything is a ratio of two things of one process, in turn: processor time, as it is less moved by what
else a machine does, or memory that XLA's analysis tells without running anything. A bound is what was
measured when it was set, times 2 for processor time, of which a busy machine alone makes 1.4, and times
1.1 for memory.
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
from ravine.optimizers.roles import IN_OUT
from ravine.stability import fused_cross_entropy, skip_step

FILE = Path(__file__).with_name("guard.json")
MARGIN = {"time": 2.0, "memory": 1.1}


def tree(leaves: int, side: int) -> dict[str, jax.Array]:
    """Equal leaves of normal numbers."""
    rng = np.random.default_rng(0)
    return {
        f"{at:03}": jnp.asarray(rng.normal(size=(side, side)), jnp.float32) for at in range(leaves)
    }


class Update:
    """An optimizer's update on a tree, parameters added, compiled for the processor time it takes."""

    def __init__(self, tx: optax.GradientTransformation, params: dict[str, jax.Array]):
        self._tx, self._grads = optax.with_extra_args_support(tx), params
        self._params = jax.tree.map(jnp.copy, params)
        self._state = jax.jit(tx.init)(params)

    def compile(self) -> float:
        """Processor seconds of tracing, lowering and compiling."""

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = self._tx.update(grads, state, params, loss=jnp.float32(1))
            return state, optax.apply_updates(params, updates)

        jax.clear_caches()
        started = time.process_time()
        jitted = jax.jit(update, donate_argnums=(1, 2))
        self._compiled = jitted.lower(self._grads, self._state, self._params).compile()
        return time.process_time() - started

    def step(self) -> float:
        """Processor seconds of one step."""
        started = time.process_time()
        self._state, self._params = self._compiled(self._grads, self._state, self._params)
        jax.block_until_ready(self._params)
        return time.process_time() - started

    @property
    def temporary(self) -> int:
        """Bytes."""
        return self._compiled.memory_analysis().temp_size_in_bytes


def in_turn(one: Callable[[], float], other: Callable[[], float], times: int) -> float:
    """The median of the ratios of neighbours."""
    return statistics.median(one() / other() for _ in range(times))


def against(
    ours: optax.GradientTransformation, theirs: optax.GradientTransformation, leaves: int, side: int
) -> dict[str, float]:
    """Ratios of compile time, step time and temporary memory."""
    a, b = (Update(tx, tree(leaves, side)) for tx in (ours, theirs))
    compiled = in_turn(a.compile, b.compile, 3)
    in_turn(a.step, b.step, 2)
    memory = a.temporary / b.temporary
    return {"compile": compiled, "step": in_turn(a.step, b.step, 15), "memory": memory}


def growth(tx: optax.GradientTransformation) -> float:
    """Compile time of 48 equal leaves over that of 6."""
    many, few = (Update(tx, tree(leaves, 64)) for leaves in (48, 6))
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
    """What each is made of, and its value."""
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
    passed = []
    for name, (kind, value) in measured().items():
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
    if why:
        FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if passed:
        sys.exit(f"past the bound of {FILE.name}: {'; '.join(passed)}.")


if __name__ == "__main__":
    main()
