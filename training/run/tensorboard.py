"""Records as TensorBoard event files, by tensorboardX, which is an extra.

It writes to a disk; files for a bucket are written in a temporary folder, and copied as often as asked.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..data.buckets import url_of
from .mirror import mirrored


def writer_of(folder: Path) -> Any:
    """A writer of event files into a folder.

    Raises:
      ValueError: if tensorboardX is not installed.
    """
    return _module().SummaryWriter(str(folder))


def check() -> None:
    """Raises the error of `writer_of`."""
    _module()


@contextlib.contextmanager
def events(
    folder: Path,
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[], None]]]:
    """Two functions: one writes every number of a record at its step, one copies to a bucket.

    Args:
      folder: for event files, in a bucket too; there they are in the end at the latest.
    """
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(mirrored(url)) if (url := url_of(folder)) else None
        writer = writer_of(mirror.folder if mirror else folder)
        stack.callback(writer.close)

        def write(record: dict[str, Any]) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        def copy() -> None:
            if mirror:
                writer.flush()
                mirror.try_to_copy()

        yield write, copy


def _module() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError:
        raise ValueError(
            "--tensorboard needs tensorboardX; pip install 'ravine[tensorboard]', or leave it out."
        ) from None
