"""What the parts of `python benchmarks gpu` share: trees made on the device, limits, and updates."""

import contextlib
import dataclasses
import datetime
import functools
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import ravine
from measure import compared, in_turn, spread
from ravine import stability
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig
from ravine.training.plan.flops import arithmetic
from ravine.training.step import parameters

GPT = {"vocabulary": 50_304, "activation": "gelu", "tied": True}
LARGE: dict[str, Any] = {
    "updates_124m": ModelConfig(**GPT, width=768, layers=12, heads=12, feed_forward=3072),
    "updates_1b3": ModelConfig(**GPT, width=2048, layers=24, heads=16, feed_forward=8192),
    "steps": {
        "the race's, 1024 tokens": (RunConfig().model, 16),
        "GPT-2's shape, 16384 tokens": (
            ModelConfig(
                vocabulary=50_304,
                tied=True,
                context=1024,
                width=768,
                layers=12,
                heads=12,
                dtype="bfloat16",
                attention="cudnn",
            ),
            16,
        ),
    },
}
TINY = ModelConfig(width=64, layers=2)
SMALL: dict[str, Any] = {
    "updates_124m": TINY,
    "updates_1b3": TINY,
    "steps": {"tiny": (ModelConfig(width=32, layers=1), 4)},
}
"""The models of each part, and of train steps the rows of a batch."""

PERIOD = 10
BLOCKED = {"blocks": ravine.Blocks(size=1024), "refresh": ravine.Refresh(every=PERIOD)}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: ravine.adamw(1e-3, weight_decay=0.1),
    "lion": lambda: ravine.lion(1e-4),
    "muon": lambda: ravine.muon(0.02),
    "shampoo": lambda: ravine.shampoo(1e-3, **BLOCKED),
    "soap": lambda: ravine.soap(1e-3, **BLOCKED),
}
ELEMENTWISE = ("adamw", "lion")
BARS = {"adamw": 0.85, "lion": 0.85, "muon": 0.6, "shampoo": 2.0}
"""The least share of the copy or of the product; of Shampoo, the most of Muon's time."""
GUARDS = {"skip_step": stability.skip_step, "finite_gate": stability.finite_gate}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes per second, and operations per second of bfloat16 products."""

    moved: dict[str, list[float]]
    products: dict[str, list[float]]

    @property
    def bytes(self) -> float:
        return max(map(statistics.median, self.moved.values()))

    @property
    def flop(self) -> float:
        return max(map(statistics.median, self.products.values()))

    def lines(self) -> list[str]:
        """A table of them."""
        return [
            "| limit | measured |",
            "|---|---|",
            *(f"| {way}, GB/s | {_in(x, 1e9)} |" for way, x in self.moved.items()),
            *(f"| {way}, TFLOP/s | {_in(x, 1e12)} |" for way, x in self.products.items()),
            "",
        ]


def _in(values: list[float], unit: float) -> str:
    return spread([value / unit for value in values])


@functools.cache
def limits(small: bool) -> Limits:
    """What the device can do."""
    elements = 2**20 if small else 2**29
    held = jnp.ones(elements, jnp.float32), jnp.zeros(elements, jnp.float32)
    ways: dict[str, Callable[..., Any]] = {
        "copy": lambda source, target: (source, target.at[:].set(source)),
        "addition in place": lambda source, target: (source, target + 1.0),
    }
    moved = {}
    for way, function in ways.items():
        jitted = jax.jit(function, donate_argnums=(0, 1))
        moved[way] = []
        for turn in range(8):
            started = time.perf_counter()
            for _ in range(10):
                held = jitted(*held)
            jax.block_until_ready(held)
            if turn:
                moved[way].append(10 * 8 * elements / (time.perf_counter() - started))
    del held
    products = {}
    for side in (128, 256) if small else (2048, 4096, 8192):
        matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
        multiplied = jax.jit(lambda a, b: a @ b)
        rates = []
        for turn in range(8):
            started, product = time.perf_counter(), matrix
            for _ in range(10):
                product = multiplied(matrix, matrix)
            jax.block_until_ready(product)
            if turn:
                rates.append(10 * 2.0 * side**3 / (time.perf_counter() - started))
        products[f"bfloat16 product of side {side}"] = rates
    return Limits(moved, products)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Parameters, their gradients, and the dtype of both."""

    params: Any
    grads: Any
    dtype: str


def tree_of(model: ModelConfig, dtype: str) -> Tree:
    """The model's parameters, and gradients whose rows and columns fall off as a power."""

    def gradient(at: int, param: jax.Array) -> jax.Array:
        noise = 1e-3 * jax.random.normal(jax.random.key(at), param.shape)
        for axis in range(max(param.ndim - 2, 0), param.ndim):
            sizes = jnp.arange(1, param.shape[axis] + 1) ** -0.5
            noise = noise * jnp.expand_dims(sizes, [a for a in range(param.ndim) if a != axis])
        return noise.astype(dtype)

    @jax.jit
    def made(key: jax.Array) -> tuple[Any, Any]:
        params = jax.tree.map(lambda x: x.astype(dtype), parameters(model, key))
        leaves, structure = jax.tree.flatten(params)
        return params, structure.unflatten([gradient(i, x) for i, x in enumerate(leaves)])

    return Tree(*made(jax.random.key(0)), dtype)


class Updates:
    """An optimizer's updates of a tree, one after the other."""

    def __init__(self, tx: optax.GradientTransformation, tree: Tree):
        tx = optax.with_extra_args_support(tx)

        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, loss=jnp.float32(1))
            return state, optax.apply_updates(params, updates)

        self._grads = tree.grads
        self._params = jax.tree.map(jnp.copy, tree.params)
        self._state = jax.jit(tx.init)(self._params)
        self.bytes = self._moved()
        traced = jax.jit(update, donate_argnums=(1, 2)).trace(
            self._grads, self._state, self._params
        )
        self.flop = arithmetic(traced, devices=1).always
        self._compiled = traced.lower().compile()
        self.mean(PERIOD)

    def _moved(self) -> int:
        """Bytes of an update that reads everything once, and writes state and parameters."""
        sizes = [
            sum(x.nbytes for x in jax.tree.leaves(tree))
            for tree in (self._grads, self._state, self._params)
        ]
        return sizes[0] + 2 * sizes[1] + 2 * sizes[2]

    def mean(self, updates: int) -> float:
        """Seconds of an update, of so many with one wait at the end."""
        started = time.perf_counter()
        for _ in range(updates):
            self._state, self._params = self._compiled(self._grads, self._state, self._params)
        jax.block_until_ready((self._state, self._params))
        return (time.perf_counter() - started) / updates


@dataclasses.dataclass(frozen=True)
class Row:
    """What an optimizer's updates take."""

    name: str
    seconds: list[float]
    slowest: float
    bytes: int
    flop: float

    @property
    def update(self) -> float:
        return statistics.median(self.seconds)

    def line(self, found: Limits, muon: float | None) -> str:
        """The row of a table."""
        copied = self.bytes / self.update / found.bytes
        multiplied = self.flop / self.update / found.flop
        of_muon = self.update / muon if muon else None
        bar = BARS.get(self.name)
        value = copied if self.name in ELEMENTWISE else multiplied
        if self.name == "shampoo":
            said = "none" if of_muon is None else _bar(of_muon <= BARS["shampoo"], "at most", bar)
        else:
            said = "none" if bar is None else _bar(value >= bar, "at least", bar)
        cells = [
            self.name,
            spread([1e3 * s for s in self.seconds]),
            f"{1e3 * self.slowest:.3g}",
            f"{copied:.2f}" if self.name in ELEMENTWISE else "",
            f"{multiplied:.2f}" if self.name == "muon" else "",
            "" if of_muon is None else f"{of_muon:.2f}",
            said,
        ]
        return " | ".join(cells) + " |"


def _bar(met: bool, sense: str, bar: float | None) -> str:
    return f"{sense} {bar:g}, {'met' if met else '**missed**'}"


def updated(name: str, tree: Tree, turns: int, profile: Path | None) -> Row | None:
    """A row of the table; none if the optimizer does not fit into memory."""
    try:
        updates = Updates(OPTIMIZERS[name](), tree)
        seconds = [updates.mean(PERIOD) for _ in range(turns)]
        slowest = max(updates.mean(1) for _ in range(2 * PERIOD))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    if profile:
        with jax.profiler.trace(str(profile / f"{name}-{tree.dtype}")):
            updates.mean(3)
    return Row(name, seconds, slowest, updates.bytes, updates.flop)


def guarded(name: str, tree: Tree, turns: int) -> str:
    """The end of a line of the table: AdamW in a guard, and alone, called in turn."""
    alone = Updates(OPTIMIZERS["adamw"](), tree)
    inside = Updates(GUARDS[name](OPTIMIZERS["adamw"]()), tree)
    times = in_turn(lambda: inside.mean(PERIOD), lambda: alone.mean(PERIOD), turns)
    return compared(times, None, PERIOD)


def heading(command: str) -> list[str]:
    """Where and when a table was measured: the device, and its driver."""
    driver = ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        driver = f", driver {said.splitlines()[0]}"
    device = jax.devices()[0].device_kind
    return [f"`{command}`, {datetime.date.today()}, JAX {jax.__version__}, {device}{driver}.", ""]
