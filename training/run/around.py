"""What surrounds a run: the paths that it reads and writes, and who is told how it goes on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .origin import Origin


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """Where a run writes, and what it branches off."""

    folder: Path
    """An existing folder, of the first process, for ``metrics.jsonl`` and samples."""
    store: Path | None = None
    """The folder of checkpoints, which all processes see; by default in `folder`."""
    origin: Origin | None = None
    """A checkpoint of another run to start from, where there are none yet."""

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.store or self.folder / "checkpoints"


def _nothing(*_: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run calls; by default nothing."""

    on_start: Callable[[], None] = _nothing
    """When nothing is left that could refuse the run, before anything is written."""
    on_record: Callable[[dict[str, float]], None] = _nothing
    """With every record."""
    on_checkpoint: Callable[[], None] = _nothing
    """In the background, when a checkpoint is whole; in a bucket before its seal."""


NO_HOOKS = Hooks()
