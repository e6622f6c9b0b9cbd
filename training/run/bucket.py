"""The folder of a race in a bucket, as a copy of one on the local disk.

An object store has no append, no rename and no lock that ends with its process, all of which a run
needs. So a race works in a temporary folder, and `Bucket.copy` makes the objects in the bucket what
the files there are: when it starts, after every checkpoint and every run, and at its end. A checkpoint's
seal is written after everything it lists, so that one whose copy was cut off is recognized as any other.

In ``gs://`` Orbax writes the checkpoints itself, from every process; they are not on the disk then, and
all else is copied before a checkpoint gets its seal.

The lock is one in the bucket, see `bucket_lock`.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..data.buckets import NO_ROOM, no_room, orbax_writes, refusals
from .bucket_lock import BucketLock
from .folder import CHECKPOINTS, LOCK, RACE, REFUSED
from .mirror import Mirror, stamp_of, temporary_folder
from .outcome import RunFailed
from .output import say


class Bucket(Mirror):
    """The folder of a race on the local disk, its copy, and the lock there.

    Args:
      url: of the copy.
      folder: the one on the disk.
    """

    def __init__(self, url: str, folder: Path):
        super().__init__(url, folder)
        self._lock = BucketLock(self._files, url, self._root)

    def hold(self) -> None:
        """Takes the lock.

        Raises:
          ValueError: if another race holds it, by its holder, or if it cannot be created.
        """
        with refusals(self.url):
            if self._files.isfile(self._root):
                raise ValueError("a file; give --out a folder")
        self._lock.hold()

    def release(self) -> None:
        """Gives the lock back, if it is ours."""
        self._lock.release()

    def copy(self) -> None:
        """As of any mirror.

        Raises:
          RunFailed: if another race has taken over the lock; nothing is copied then.
        """
        self._lock.check()
        super().copy()

    def fetch(self, *, resume: bool, overwrite: bool) -> None:
        """Brings the race that goes on to the disk, or checks that there is none.

        Raises:
          ValueError: for a bucket that holds anything else.
        """
        url = self.url
        with refusals(url):
            self._files.invalidate_cache()  # of listings
            names = [self._name(path) for path in self._files.find(self._root)]
            names = [name for name in names if not name.startswith(LOCK)]
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
        if orbax_writes(Path(url)):
            theirs = [name for name in theirs if _part(name) not in (CHECKPOINTS, REFUSED)]
        files = [self.folder / name for name in theirs]
        for parent in {file.parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        with refusals(url):
            self._files.get(list(map(self._path, theirs)), list(map(str, files)))
            self._copied = {name: stamp_of(file) for name, file in zip(theirs, files, strict=True)}

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
    folder = temporary_folder(url)
    bucket = Bucket(url, folder)
    complaint = ""
    try:
        bucket.hold()
        bucket.fetch(resume=resume, overwrite=overwrite)
        yield bucket
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise ValueError(no_room(url, cause)) from error
        raise ValueError(str(error).replace(str(folder), url)) from error
    finally:
        try:
            if bucket.begun:
                bucket.copy()
        except (ValueError, RunFailed) as error:
            complaint = (
                f"the results are not all in the bucket ({error}) They are in {folder}: copy them by "
                "hand, or go on with --resume and that folder as --out."
            )
            say(f"ravine: {complaint}")
        else:
            shutil.rmtree(folder.parent, ignore_errors=True)
        bucket.release()
    if complaint:
        raise RunFailed(complaint)


def _part(name: str) -> str:
    """What of a run an object is."""
    return [*PurePosixPath(name).parts, "", ""][1]


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
