"""JAX's profile of a few updates, for TensorBoard, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

START, STOP = 10, 20


class Profile:
    """Traces the updates from the eleventh to the twentieth that a process makes in a run.

    Args:
      folder: for the trace; none is made without.
      done: updates made before.
    """

    def __init__(self, folder: Path | None, done: int):
        self._folder, self._from, self._running = folder, done, False

    def before(self, step: int, state: Any) -> None:
        """To be called before every update, with the state it takes."""
        if self._folder is None or step - self._from not in (START, STOP):
            return
        jax.block_until_ready(state)
        if step - self._from == START:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        """Ends a trace that runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
