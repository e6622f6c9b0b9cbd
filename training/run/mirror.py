"""A folder on the local disk whose files are copied to a bucket, as often as is asked."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs

from ..data.buckets import refusals
from .folder import HOLDER, LOCK
from .output import say
from .seal import SEAL

_CHECKPOINT = re.compile(r"([^/]+/checkpoints/[^/]+)/.+")


class Mirror:
    """A folder on the local disk, and its copy.

    Args:
      url: of the copy.
      folder: the one on the disk.

    Raises:
      ValueError: for a URL that nothing opens.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        with refusals(url):
            self._files, self._root = url_to_fs(url)
        self._copied: dict[str, tuple[int, int]] = {}  # sizes and times of files when they were
        self.begun = False
        """Whether there is anything in the bucket from here."""

    def copy(self) -> None:
        """Makes the bucket's objects what the files are; those of others stay as they are.

        Raises:
          ValueError: in a line, if that fails. What is missing then is copied by the next call.
        """
        there = self._there()
        changed = [name for name, stamp in there.items() if self._copied.get(name) != stamp]
        gone = [name for name in self._copied if not (self.folder / name).exists()]
        # A checkpoint is none while its files change: its seal goes first and comes last.
        seals = [name for name in changed if _is_seal(name)]
        with refusals(self.url):
            for name in [*filter(self._copied.__contains__, seals), *filter(_is_seal, gone)]:
                self._remove(name)
            for names in ([name for name in changed if name not in seals], seals):
                self._upload({name: there[name] for name in names})
            for name in gone:
                self._remove(name)
        self.begun = True

    def try_to_copy(self) -> None:
        """Copies; where that fails it says so, and the next copy makes up for it."""
        try:
            self.copy()
        except ValueError as error:
            say(
                f"ravine: not copied: {error} The run goes on, and the next copy includes this one."
            )

    def _there(self) -> dict[str, tuple[int, int]]:
        """The files to copy: no locks, nothing half written."""
        found = {}
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            part = _CHECKPOINT.fullmatch(name)
            whole = part is None or (self.folder / part[1] / SEAL).is_file()
            if whole and name not in (LOCK, HOLDER) and file.suffix != ".tmp" and file.is_file():
                found[name] = stamp_of(file)
        return found

    def _upload(self, stamps: dict[str, tuple[int, int]]) -> None:
        files = [name for name in stamps if _CHECKPOINT.fullmatch(name)]
        for name in stamps.keys() - files:  # records may grow meanwhile
            self._files.pipe_file(self._path(name), (self.folder / name).read_bytes())
        if files:
            here = [str(self.folder / name) for name in files]
            self._files.put(here, list(map(self._path, files)))
        self._copied |= stamps

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))
        self._copied.pop(name, None)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """An empty temporary folder that is copied to a bucket in the end, and then removed.

    If that fails it is said where the folder is, which then stays.

    Args:
      url: of a folder in the bucket; objects that are there stay.

    Raises:
      ValueError: for a URL that nothing opens.
    """
    mirror = Mirror(url, temporary_folder(url))
    try:
        yield mirror
    finally:
        try:
            mirror.copy()
        except ValueError as error:
            say(f"ravine: not copied: {error} What is missing there is in {mirror.folder}.")
        else:
            shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def temporary_folder(url: str) -> Path:
    """A new folder of the same name on the local disk, alone in another.

    Raises:
      ValueError: for a URL that nothing opens, or a disk that is full.
    """
    with refusals(url):
        url_to_fs(url)
        folder = Path(tempfile.mkdtemp(prefix="ravine-")) / PurePosixPath(url).name
        folder.mkdir()
        return folder


def stamp_of(file: Path) -> tuple[int, int]:
    """What changes when a file is written: its size and time."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _is_seal(name: str) -> bool:
    return PurePosixPath(name).name == SEAL
