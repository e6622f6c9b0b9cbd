"""Shared by the benchmarks: an optimizer that is compiled and stepped, and the page of tables."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


class Contender:
    """One optimizer on one tree: `compile` compiles it again, `step` runs one step.

    Both return seconds, measured by `clock`.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        tree: dict,
        clock: Callable[[], float] = time.perf_counter,
    ):
        tx = optax.with_extra_args_support(tx)

        def update(grads, state, params):
            updates, state = tx.update(grads, state, params, loss=jnp.float32(1))
            return state, optax.apply_updates(params, updates)

        self._update, self._clock = update, clock
        self._grads = jax.tree.map(jnp.asarray, tree)
        self._params = jax.tree.map(lambda x: jnp.asarray(x[::-1].copy()), tree)
        self._state = jax.jit(tx.init)(self._params)

    def compile(self) -> float:
        jax.clear_caches()
        started = self._clock()
        jitted = jax.jit(self._update, donate_argnums=(1, 2))
        self.compiled = jitted.lower(self._grads, self._state, self._params).compile()
        return self._clock() - started

    def step(self) -> float:
        started = self._clock()
        self._state, self._params = self.compiled(self._grads, self._state, self._params)
        jax.block_until_ready(self._params)
        return self._clock() - started

    def mean(self, steps: int) -> float:
        """Of so many steps."""
        return sum(self.step() for _ in range(steps)) / steps

    @property
    def temporary_megabytes(self) -> float:
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the state, and of the parameters."""
        state, params = (
            sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (self._state, self._params)
        )
        return state, params


PAUSE = 0.05
"""Seconds between two turns, in which threads that still wait for work go to sleep."""


def in_turn(
    ours: Callable[[], float], theirs: Callable[[], float], turns: int
) -> list[tuple[float, float]]:
    """What both say, called A B A B."""

    def rested(call: Callable[[], float]) -> float:
        time.sleep(PAUSE)
        return call()

    return [(rested(ours), rested(theirs)) for _ in range(turns)]


def medians(times: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Of our times, of theirs, and of the ratios of both, where each pair was measured in turn."""
    ours, theirs = zip(*times, strict=True)
    ratio = statistics.median(mine / other for mine, other in times)
    return statistics.median(ours), statistics.median(theirs), ratio


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, and in parentheses the least and the most."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}g} ({least:.{digits}g}–{most:.{digits}g})"


def verdict(ratio: float, bar: float | None) -> str:
    """Of a ratio that shall be at most the bar."""
    if bar is None:
        return "none"
    return f"{bar:g}, met" if ratio <= bar else f"{bar:g}, **missed**"


def compared(times: Sequence[tuple[float, float]], bar: float | None, steps: int) -> str:
    """The end of a line of a table: milliseconds of both, their ratio, the bar, and turns of steps."""
    sides = ([1e3 * x for x in side] for side in zip(*times, strict=True))
    ratios = [ours / theirs for ours, theirs in times]
    cells = [*map(spread, sides), spread(ratios), verdict(statistics.median(ratios), bar)]
    return "| ".join(f"{cell} " for cell in [*cells, f"{len(times)} × {steps}"]) + "|"


def heading(command: str) -> list[str]:
    """Where and when a table was measured."""
    return [
        f"`{command}`, {datetime.date.today()}, JAX {jax.__version__}, {platform.machine()}, "
        f"{jax.device_count()} {jax.default_backend()} device(s).",
        "",
    ]


def write(mark: str, lines: list[str]) -> None:
    """Writes lines between the marks ``<!-- mark -->`` and ``<!-- /mark -->`` of docs/benchmarks.md."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    PAGE.write_text("\n".join([before + start, *lines, end + after]), encoding="utf-8")
