"""Ctrl-C and SIGTERM end a run between two steps, never inside native code.

An exception raised wherever Python happens to be, which is what Ctrl-C does by default, may be raised in
a callback of the compiler, and ended half of all interruptions with a crash. Here a thread of its own
notes a signal, at once even while the main thread compiles, and `check` raises where that is safe. If
the main thread does not come to a `check` in time, or the user insists, that thread ends the process.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .output import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # seconds from a signal to a step's end
_LAST_WORDS = 5.0  # seconds for what is said when there was none

_active: "Interrupts | None" = None


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `status` is what a shell expects of it, 130 or 143."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interrupts:
    """While it is entered, SIGINT and SIGTERM are noted for `check`, and end the process if that fails.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
      grace: seconds that the main thread has to reach a `check`.
    """

    def __init__(self, grace: float = GRACE):
        self.grace = grace
        self.received: int | None = None
        self.last_words: Callable[[], None] | None = None
        self._deadline: float | None = None
        self._before: list[Any] = []

    def __enter__(self) -> "Interrupts":
        global _active
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            self._thread.start()
            _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        if not self._before:
            return
        _active = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)
        os.close(self._write)  # which ends the thread
        self._thread.join()
        os.close(self._read)

    def acknowledge(self) -> None:
        """The main thread knows; only another signal ends the process now."""
        self._deadline = None

    def _watch(self) -> None:
        while True:
            wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], wait)
            if not ready:
                if self._deadline is not None:  # else it was acknowledged meanwhile
                    self._end()
                continue
            numbers = os.read(self._read, 64)
            if not numbers:
                return
            for number in filter(SIGNALS.__contains__, numbers):
                if self.received is not None or self.last_words is None:
                    self.received = self.received or number
                    self._end()
                self.received = number
                self._deadline = time.monotonic() + self.grace
                say("interrupted: ending after this step; once more to end at once")

    def _end(self) -> None:
        assert self.received is not None
        if self.last_words is not None:
            speaker = threading.Thread(target=self.last_words, daemon=True)
            speaker.start()
            speaker.join(_LAST_WORDS)
        say("interrupted")
        leave(128 + self.received)


def leave(status: int) -> None:
    """Ends the process at once: taken apart while threads compile or write, Python may crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def pending() -> bool:
    """Whether a signal waits for `check`."""
    return _active is not None and _active.received is not None


def check() -> None:
    """Raises `Interrupted` if there was a signal; to be called where an exception does no harm."""
    if _active is not None and _active.received is not None:
        _active.acknowledge()
        raise Interrupted(_active.received)


@contextlib.contextmanager
def last_words(speak: Callable[[], None]) -> Iterator[None]:
    """While entered, a signal waits for `check`, and `speak` is called if there is none in time.

    Elsewhere nothing is lost, and a signal ends the process at once.
    """
    if _active is None:
        yield
        return
    active = _active
    active.last_words = speak
    try:
        yield
    finally:
        active.last_words = None
