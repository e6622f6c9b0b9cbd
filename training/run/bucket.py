"""The folder of a race in a bucket, as a copy of one on the local disk.

An object store has no append, no rename and no lock that ends with its process, all of which a run
needs. So a race works in a temporary folder, and `Bucket.copy` makes the objects in the bucket what
the files there are: when it starts, after every checkpoint and every run, and at its end. A checkpoint's
seal is written after everything it lists, so that one whose copy was cut off is recognized as any other.

The lock is an object that is created only if there is none. It stays behind where a process is killed.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from ..checkpoint import SEAL
from ..data.buckets import refusals
from .folder import HOLDER, LOCK, RACE
from .outcome import RunFailed
from .output import say

_CHECKPOINT = re.compile(r"([^/]+/checkpoints/[^/]+)/.+")


class Bucket:
    """A folder on the local disk, and its copy.

    Args:
      url: of the copy.
      folder: the one on the disk.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        with refusals(url):
            self._files, self._root = url_to_fs(url)
        self._copied: dict[str, tuple[int, int]] = {}  # sizes and times of files when they were
        self._mine = b""
        self.begun = False
        """Whether there is anything in the bucket from here."""

    def hold(self) -> None:
        """Creates the lock.

        Raises:
          ValueError: if there is one, by its holder, or if it cannot be created.
        """
        with refusals(self.url):
            if self._files.isfile(self._root):
                raise ValueError("a file; give --out a folder")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        mine, lock = json.dumps(holder).encode(), self._path(LOCK)
        with contextlib.suppress(FileExistsError), refusals(self.url, passes=FileExistsError):
            self._files.pipe_file(lock, mine, mode="create")
        with refusals(self.url):
            found = self._files.cat_file(lock)
        if found != mine:
            raise ValueError(
                f"{self.url} is in use by {_told(found)}; wait for it or give another --out. If that "
                f"process was killed, remove {self.url}/{LOCK} first."
            )
        self._mine = mine

    def release(self) -> None:
        """Removes the lock, if it is ours."""
        if not self._mine:
            return
        with contextlib.suppress(Exception):
            if self._files.cat_file(self._path(LOCK)) == self._mine:
                self._files.rm_file(self._path(LOCK))
        self._mine = b""

    def fetch(self, *, resume: bool, overwrite: bool) -> None:
        """Brings the race that goes on to the disk, or checks that there is none.

        Raises:
          ValueError: for a bucket that holds anything else.
        """
        url = self.url
        with refusals(url):
            self._files.invalidate_cache()  # of listings
            names = [self._name(path) for path in self._files.find(self._root)]
            names = [name for name in names if name != LOCK]
            manifest = self._files.cat_file(self._path(RACE)) if RACE in names else b""
        if resume and not manifest:
            raise ValueError(f"{url} holds no race; --resume needs the --out of an earlier one.")
        if not resume:
            if names and overwrite:
                raise ValueError(
                    f"--overwrite clears no bucket; remove {url} by hand, or give another --out."
                )
            if names:
                what = "another run; give --resume or" if manifest else "files; give"
                raise ValueError(f"{url} holds {what} another --out.")
            return
        theirs = [name for name in names if _is_written(name, _writes(manifest))]
        files = [self.folder / name for name in theirs]
        for parent in {file.parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        with refusals(url):
            self._files.get(list(map(self._path, theirs)), list(map(str, files)))
            self._copied = {name: _stamp(file) for name, file in zip(theirs, files, strict=True)}

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
                found[name] = _stamp(file)
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

    def _name(self, path: str) -> str:
        return PurePosixPath(path).relative_to(self._root).as_posix()


@contextlib.contextmanager
def bucket_folder(url: str, *, resume: bool = False, overwrite: bool = False) -> Iterator[Bucket]:
    """A folder in a bucket, held by this process, with its working folder.

    The working folder is empty, or has the race that goes on.
    If it was copied before, it is in the end once more. Then the working folder is removed; it stays if
    that fails.

    Args:
      url: of the folder in the bucket.
      resume: go on with the race that is there.
      overwrite: refused where there is anything.

    Raises:
      ValueError: for a bucket that is in use, cannot be reached, or holds anything else. Messages about
        the working folder name the URL.
      RunFailed: if the last copy fails.
    """
    if url.startswith("file:"):
        raise ValueError(f"{url} is on this machine; give --out the path itself.")
    if not PurePosixPath(url.partition("://")[2]).name:
        raise ValueError(f"{url} names no bucket; give --out one, and a folder in it.")
    above = Path(tempfile.mkdtemp(prefix="ravine-"))
    folder = above / PurePosixPath(url).name
    folder.mkdir()
    bucket = Bucket(url, folder)
    complaint = ""
    try:
        bucket.hold()
        bucket.fetch(resume=resume, overwrite=overwrite)
        yield bucket
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), url)) from error
    finally:
        try:
            if bucket.begun:
                bucket.copy()
        except ValueError as error:
            complaint = (
                f"the results are not all in the bucket ({error}) They are in {folder}: copy them by "
                "hand, or go on with --resume and that folder as --out."
            )
            say(f"ravine: {complaint}")
        else:
            shutil.rmtree(above, ignore_errors=True)
        bucket.release()
    if complaint:
        raise RunFailed(complaint)


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _is_seal(name: str) -> bool:
    return PurePosixPath(name).name == SEAL


def _told(holder: bytes) -> str:
    try:
        found: Any = json.loads(holder)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _writes(manifest: bytes) -> list[str]:
    """What a race writes, by its `race.json`; damage is for `claimed` to report."""
    try:
        return [RACE, *map(str, json.loads(manifest)["writes"])]
    except (ValueError, KeyError, TypeError):
        return [RACE]


def _is_written(name: str, writes: list[str]) -> bool:
    """Whether an object is one of the race's, and would not lie outside of its folder."""
    if ".." in PurePosixPath(name).parts:
        return False
    return any(name == path or (path.endswith("/") and name.startswith(path)) for path in writes)
