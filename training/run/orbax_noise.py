"""Silences what Orbax and TensorStore print when they raise; Ravine reports the error once."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet() -> None:
    """From now on an error of Orbax, which it raises, is not printed by its threads as well.

    Orbax (0.12) logs the same traceback from each of its threads. Its event loop closes at the first
    error, and TensorStore's threads, whose writes end later, each print that they cannot reach it, even
    after the checkpointer is closed; hence this is not undone.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("absl").addFilter(_not_raised)


def _not_raised(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)
