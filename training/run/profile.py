"""JAX's profile of a few updates, for TensorBoard, XProf or Perfetto.

JAX writes to a disk; a profile for a bucket is made in a temporary folder, and copied once it is whole.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax

from ..data.buckets import url_of
from .mirror import mirrored

START, STOP = 10, 20


class Profile:
    """Traces the updates from the eleventh to the twentieth that a process makes in a run.

    Args:
      folder: for the trace, in a bucket too; none is made without.
      done: updates made before.
    """

    def __init__(self, folder: Path | None, done: int):
        self._folder, self._from, self._running = folder, done, contextlib.ExitStack()

    def before(self, step: int, state: Any) -> None:
        """To be called before every update, with the state it takes."""
        if self._folder is None or step - self._from not in (START, STOP):
            return
        jax.block_until_ready(state)
        if step - self._from == START:
            folder = self._folder
            if url := url_of(folder):
                folder = self._running.enter_context(mirrored(url)).folder
            jax.profiler.start_trace(str(folder))
            self._running.callback(jax.profiler.stop_trace)
        else:
            self.close()

    def close(self) -> None:
        """Ends a trace that runs."""
        self._running.close()
