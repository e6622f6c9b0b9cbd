"""A checkpoint of another run, from which a branch starts, on a disk or in a bucket."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs

from ..data.buckets import orbax_writes, refusals, url_of
from ..distributed import is_first
from .mirror import temporary_folder
from .seal import names_in


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint of another run, from which a branch starts."""

    run: Path
    """The folder of that run."""
    step: int
    copy: Path | None = None
    """Of a run in a bucket, what is on this disk."""

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints of that run."""
        return self.run / "checkpoints"

    @property
    def folder(self) -> Path:
        """Where it is read from; Orbax reads ``gs://`` itself."""
        here = self.run if self.copy is None or orbax_writes(self.run) else self.copy
        return here / "checkpoints" / str(self.step)

    @property
    def records(self) -> Path:
        """Where the other files of the run are read."""
        return self.copy or self.run


@contextlib.contextmanager
def on_disk(origin: Origin | None) -> Iterator[Origin | None]:
    """An origin, and while entered what it needs on the disk, if it is in a bucket.

    That is the records, for the first process, and a checkpoint that Orbax cannot read where it is. They
    are removed in the end.

    Raises:
      ValueError: for a bucket that cannot be read, or a disk that is full.
    """
    if origin is None or not (url := url_of(origin.run)) or not is_first():
        yield origin
        return
    folder = temporary_folder(url)
    try:
        with refusals(url):
            files, root = url_to_fs(url)
            files.invalidate_cache()
            for name in ("meta.json", "metrics.jsonl"):
                if files.exists(f"{root}/{name}"):
                    files.get_file(f"{root}/{name}", str(folder / name))
            step = str(origin.step)
            if not orbax_writes(origin.run) and step in names_in(origin.checkpoints):
                inside = f"{root}/checkpoints/{step}"
                for path in files.find(inside):
                    file = folder / "checkpoints" / step / path.removeprefix(f"{inside}/")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    files.get_file(path, str(file))
        yield dataclasses.replace(origin, copy=folder)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
