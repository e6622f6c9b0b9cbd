"""From metrics on the device to records on the host, without the device waiting for the host.

While step n runs, step n + 1 is put in line, and the host waits for step n before it puts in another:
the device always has work, and is never more than two steps ahead, so that a signal is answered in time.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Clock:
    """Seconds spent training: compilation and evaluation are not counted."""

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._since: float | None = None

    def start(self) -> None:
        """Goes on counting."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops counting."""
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)


class Rates:
    """The learning rates of a schedule as records show them, a block of steps at a time.

    Args:
      schedule: maps steps to learning rates.
      steps: of the run; those past them are not asked for.
    """

    BLOCK = 4096  # a call per step would take longer than a small model's step

    def __init__(self, schedule: optax.Schedule, steps: int):
        self._schedule, self._steps = schedule, steps
        self._start, self._rates = 0, np.zeros(0)

    def __getitem__(self, step: int) -> float:
        if not self._start <= step < self._start + len(self._rates):
            self._start = step - step % self.BLOCK
            block = np.arange(self._start, min(self._start + self.BLOCK, self._steps))
            self._rates = np.asarray(self._schedule(jnp.asarray(block, jnp.int32)))
        return float(self._rates[step - self._start])

    def before(self, step: int) -> np.ndarray:
        """Those of the steps before `step`, float32."""
        return np.asarray([self[at] for at in range(step)], np.float32)


class Metrics:
    """Metrics of the steps that were dispatched, until they are fetched together.

    Args:
      clock: gives the time at which a step was done.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.training.metrics import Clock, Metrics
      >>> metrics = Metrics(Clock())
      >>> for step in range(3):
      ...     metrics.add(step, {"loss": jnp.float32(step)})
      >>> [entry["step"] for entry in metrics.fetch(keep_last=True)], len(metrics)
      ([0, 1], 1)
    """

    def __init__(self, clock: Clock):
        self._clock = clock
        self._held: list[tuple[int, Mapping[str, jax.Array], float | None]] = []

    def __len__(self) -> int:
        return len(self._held)

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched, and waits for the step before."""
        if self._held:
            self._wait()
        self._held.append((step, metrics, None))

    def fetch(self, *, keep_last: bool = False) -> list[dict[str, Any]]:
        """Records of the steps held, in one transfer.

        Args:
          keep_last: leave the last step where it is, in place of waiting for it.
        """
        last = self._held[-1:] if keep_last else []
        if not keep_last and self._held:
            self._wait()
        taken = self._held[: len(self._held) - len(last)]
        self._held = last
        values = jax.device_get([metrics for _, metrics, _ in taken])
        return [
            {"step": step, "seconds": seconds, **{k: v.item() for k, v in found.items()}}
            for (step, _, seconds), found in zip(taken, values, strict=True)
        ]

    def _wait(self) -> None:
        step, metrics, seconds = self._held[-1]
        if seconds is None:
            jax.block_until_ready(metrics)
            self._held[-1] = (step, metrics, self._clock.seconds)
