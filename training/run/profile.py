"""JAX's profile of a few updates, for TensorBoard, XProf or Perfetto.

JAX writes to a disk; a profile for a bucket is made in a temporary folder, and copied once it is whole.
One that cannot be written is no reason to end a run.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..data.buckets import named, url_of
from .mirror import mirrored
from .output import say

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
            if self._try(lambda: jax.profiler.start_trace(str(folder))):
                self._running.callback(self._try, jax.profiler.stop_trace)
        else:
            self.close()

    def close(self) -> None:
        """Ends a trace that runs."""
        self._running.close()

    def _try(self, act: Callable[[], object]) -> bool:
        try:
            act()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(
                f"ravine: the profile in {named(self._folder or Path())} cannot be written ({reason})."
            )
            return False
        return True
