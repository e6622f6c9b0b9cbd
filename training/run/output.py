"""A failure to print must not end a run: a pipe may be closed, or the disk under a log may fill up."""

import contextlib
import os
import sys
from typing import Any, TextIO


def say(message: str) -> None:
    """A line on standard error, if it can be written."""
    if sys.stderr is None:
        return
    try:
        print(message, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a closed stream is a ValueError
        silence(sys.stderr)


class Output:
    """A stream that stops writing once it fails, and reports that once on standard error.

    Rich ends the process when a pipe is closed (``| head``) and raises what else goes wrong. A training
    run is worth more than its progress bar: what it finds is in its folder.

    Args:
      stream: where to write, by default standard output.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._works = self._stream is not None

    def write(self, text: str) -> int:
        """Writes, if that works."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes, if that works."""
        self._try("flush")

    def _try(self, method: str, *args: str) -> None:
        if not self._works:
            return
        try:
            getattr(self._stream, method)(*args)
        except (OSError, ValueError) as error:
            self._works = False
            silence(self._stream)
            reason = getattr(error, "strerror", None) or error
            say(f"ravine: standard output cannot be written ({reason}); the run goes on.")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: TextIO) -> None:
    """Leads to nowhere what is left in the buffer, which Python would fail to write at its end again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)
