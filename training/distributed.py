"""Many processes, one run: how they are started, and how they come to agree.

All processes make the same decisions: each computes them from the same configuration, or the first
one does and sends them to the others. Metrics and reports are written by the first.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST = 4096  # bytes of a text that processes exchange


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Devices of a run and the processes that hold them; results do not depend on it."""

    mesh: str = ""
    """Sizes of the mesh's axes over all devices of all processes, of data, fsdp, expert, context and
    tensor: data=2,fsdp=4. Without it, one device."""
    distributed: bool = False
    """Join the processes that a TPU slice, SLURM, Open MPI or Kubernetes has started."""
    coordinator: str = ""
    """Without such a launcher: host:port of process 0, the same in every process."""
    processes: int = 0
    """How many processes there are, with --coordinator."""
    process_id: int = -1
    """Index of this process, from 0, with --coordinator."""
    cpu_devices: int = 0
    """Use this many virtual devices of this machine's CPU, to try a mesh without accelerators."""

    def __post_init__(self) -> None:
        if self.coordinator:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdigit()):
                raise ValueError(f"coordinator must be host:port, got {self.coordinator!r}.")
            if self.distributed:
                raise ValueError("give --distributed or --coordinator, not both.")
            if self.processes < 1:
                raise ValueError("--coordinator needs --processes, how many there are.")
            if not 0 <= self.process_id < self.processes:
                raise ValueError(
                    f"process_id must lie in [0, {self.processes}), got {self.process_id}."
                )
        elif self.processes or self.process_id >= 0:
            raise ValueError(
                "--processes and --process-id need --coordinator, host:port of process 0."
            )
        if self.cpu_devices < 0:
            raise ValueError(f"cpu_devices must not be negative, got {self.cpu_devices}.")


def start(config: LaunchConfig) -> None:
    """Takes the devices and joins the other processes; to be called before JAX is used.

    Raises:
      ValueError: if the processes cannot be joined, or JAX was used before.
    """
    try:
        if config.cpu_devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        if config.coordinator or config.distributed:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            # It would handle SIGTERM itself, and the run would never see it (see `run.interrupts`).
            jax.config.update("jax_enable_preemption_service", False)
        if config.coordinator:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
        elif config.distributed:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the devices or processes asked for cannot be had: {error} Give --distributed under SLURM, "
            "Open MPI, Kubernetes or on every worker of a TPU slice, and --coordinator elsewhere."
        ) from error
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an assertion, where the plugin is not installed
        why = f" ({error})" if str(error) else ""
        raise ValueError(
            f"JAX has no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}{why}; install "
            "what it needs, or set JAX_PLATFORMS=cpu."
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def from_first(text: str) -> str:
    """The first process's text, in every process."""
    return _texts(text)[0]


@contextlib.contextmanager
def unanimous() -> Iterator[None]:
    """A `ValueError` inside, in one process, is raised in all of them, so that none waits for it."""
    refusal = None
    try:
        yield
    except ValueError as error:
        refusal = error
    texts = _texts(str(refusal or ""))
    if refusal is not None:
        raise refusal
    for process, text in enumerate(texts):
        if text:
            raise ValueError(f"process {process}: {text}")


def check_same(what: str, text: str) -> None:
    """Raises in every process if the processes do not have the same text."""
    texts = _texts(text)
    for process, other in enumerate(texts):
        if other != texts[0]:
            raise ValueError(f"process {process} has another {what} than process 0.")


def _texts(text: str) -> list[str]:
    """Every process's text, in every process."""
    if jax.process_count() == 1:
        return [text]
    content = text.encode()[:_LONGEST]
    padded = np.frombuffer(content.ljust(_LONGEST, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]
