"""Losses that were measured once, in a file: they are read, not measured again."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Self

from ..run.files import Lines, read_lines
from ..run.meta import provenance

Key = tuple[Any, ...]
"""JSON values that say which run it was."""


class Kept:
    """Losses by key, each a strict JSON line; a context.

    Args:
      file: made with its folder when missing; a damaged line is refused by its number.
      source: what every new line says beside the versions.

    Raises:
      ValueError: for a file that cannot be used.
    """

    def __init__(self, file: Path, **source: Any):
        file.parent.mkdir(parents=True, exist_ok=True)
        self._losses, self._source = _read(file), {**provenance(), **source}
        self._lines = Lines(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._losses

    def __getitem__(self, key: Key) -> float:
        """Infinite if the run diverged."""
        return self._losses[key]

    def add(self, key: Key, loss: float, **more: Any) -> None:
        """Keeps a loss, with what else its line says."""
        self._lines.write({"key": key, **more, "heldout_loss": loss, **self._source})
        self._losses[key] = loss


def digest(value: Any) -> str:
    """Twelve characters that change with a JSON value, for keys."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _read(file: Path) -> dict[Key, float]:
    def take(row: Any) -> tuple[Key, float]:
        loss = row["heldout_loss"]
        return tuple(row["key"]), math.inf if loss is None else loss

    fix = "remove that line, and its run is made again"
    return dict(read_lines(file, take, fix)) if file.exists() else {}
