"""Records as TensorBoard event files, by tensorboardX, which is an extra."""

import importlib
from pathlib import Path
from typing import Any


def writer_of(folder: Path) -> Any:
    """A writer of event files into a folder.

    Raises:
      ValueError: if tensorboardX is not installed.
    """
    return _module().SummaryWriter(str(folder))


def check() -> None:
    """Raises the error of `writer_of`."""
    _module()


def write(writer: Any, record: dict[str, Any]) -> None:
    """Every number of a record, at its step."""
    for name, value in record.items():
        if name != "step":
            writer.add_scalar(name, value, record["step"])


def _module() -> Any:
    try:
        return importlib.import_module("tensorboardX")
    except ImportError:
        raise ValueError(
            "--tensorboard needs tensorboardX; pip install 'ravine[tensorboard]', or leave it out."
        ) from None
