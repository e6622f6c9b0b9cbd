"""The lock of a race in a bucket: an object that says who holds it, and when that one was last heard of.

No lock in an object store ends with its process. So the holder writes the object again every `BEAT`
seconds, and once it has not for `SILENT` seconds, another race may take it over. Clocks of two machines
may differ by more than that; so the other race first watches the lock for `WATCHED` seconds, and leaves
it to a holder that writes it meanwhile. A holder that comes back, as from a network that was away, finds
another's lock in place of its own, and copies nothing more.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time
from typing import Any

from ..data.buckets import refusals
from .folder import LOCK
from .outcome import RunFailed
from .output import say

BEAT = 20.0
"""Seconds between two signs of life."""
SILENT = 300.0
"""Seconds without one after which a lock may be taken over."""
WATCHED = 60.0
"""Seconds for which it is watched before."""


class BucketLock:
    """The lock of a folder in a bucket.

    Args:
      files: the store, as fsspec has it.
      url: of the folder, for messages.
      root: of the folder, as the store has it.
    """

    def __init__(self, files: Any, url: str, root: str):
        self._files, self._url, self._path = files, url, f"{root}/{LOCK}"
        self._holder: dict[str, str | int] = {}
        self._held = False
        self._writing, self._end = threading.Lock(), threading.Event()

    def hold(self) -> None:
        """Creates the lock, or takes over one that nobody holds any more.

        Raises:
          ValueError: if there is one, by its holder, or if it cannot be created.
        """
        self._holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": _now().isoformat(timespec="seconds"),
            "id": secrets.token_hex(8),
        }
        found = self._created(self._path)
        if found is not None:
            self._take_over(found)
        # From its first sign of life on it may be taken over: where none can be written, it never is.
        self._held = True
        self._try_to_beat()
        threading.Thread(target=self._beats, name="bucket lock", daemon=True).start()

    def check(self) -> None:
        """Refuses to go on where another race has taken the lock over.

        Raises:
          RunFailed: by its holder.
          ValueError: if the lock cannot be read.
        """
        found = None
        with refusals(self._url), contextlib.suppress(FileNotFoundError):
            found = self._files.cat_file(self._path)
        if found is not None and not self._is_mine(found):
            raise RunFailed(
                f"{self._url} was taken over by {_told(found)}, as this race had given no sign of life "
                f"for {_words(SILENT)}; it ends here."
            )

    def release(self) -> None:
        """Removes the lock, if it is ours."""
        self._end.set()
        with self._writing, contextlib.suppress(Exception):
            if self._held and self._is_mine(self._files.cat_file(self._path)):
                self._files.rm_file(self._path)
            self._held = False

    def _created(self, path: str) -> bytes | None:
        """Creates an object of ours, or returns what is there."""
        mine = json.dumps(self._holder).encode()
        with contextlib.suppress(FileExistsError), refusals(self._url, passes=FileExistsError):
            self._files.pipe_file(path, mine, mode="create")
        found = b""  # if it is gone meanwhile
        with refusals(self._url), contextlib.suppress(FileNotFoundError):
            found = self._files.cat_file(path)
        return None if found == mine else found

    def _take_over(self, found: bytes) -> None:
        silent = _silence(found)
        if silent is None or silent < SILENT:
            raise self._in_use(found)
        url, who = self._url, _told(found)
        say(f"ravine: {url} is locked by {who}; watching the lock for {_words(WATCHED)}.")
        time.sleep(WATCHED)
        # Of several races that have come here, the one that creates this may write the lock.
        turn = f"{self._path}.next"
        if self._created(turn) is not None:
            raise ValueError(
                f"{url} is being taken over by another race; wait for it or give another --out. If "
                f"there is none, remove {url}/{LOCK} and {url}/{LOCK}.next."
            )
        try:
            with refusals(url):
                now = self._files.cat_file(self._path)
            if now != found:
                raise self._in_use(now)
            with refusals(url):
                self._files.pipe_file(self._path, json.dumps(self._holder).encode())
        finally:
            with contextlib.suppress(Exception):
                self._files.rm_file(turn)
        say(f"ravine: the lock of {url} is taken over from {who}.")

    def _in_use(self, found: bytes) -> ValueError:
        again = "" if _silence(found) is None else f", or try again in {_words(SILENT)}"
        return ValueError(
            f"{self._url} is in use by {_told(found)}; wait for it or give another --out. If that "
            f"process was killed, remove {self._url}/{LOCK} first{again}."
        )

    def _beats(self) -> None:
        while not self._end.wait(BEAT):
            self._try_to_beat()

    def _try_to_beat(self) -> None:
        """Writes the lock again, with the time, if it is ours; where that fails, the next one may."""
        with self._writing, contextlib.suppress(Exception):
            if self._end.is_set():
                return
            living = json.dumps(self._holder | {"seen": _now().isoformat()}).encode()
            try:
                found = self._files.cat_file(self._path)
            except FileNotFoundError:  # removed by hand
                self._files.pipe_file(self._path, living, mode="create")
                return
            if self._is_mine(found):
                self._files.pipe_file(self._path, living)

    def _is_mine(self, found: bytes) -> bool:
        return _read(found).get("id") == self._holder["id"]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _read(lock: bytes) -> dict[str, Any]:
    try:
        found = json.loads(lock)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _silence(lock: bytes) -> float | None:
    """Seconds since the last sign of life, by the clocks of two machines; none if there was none."""
    try:
        seen = datetime.datetime.fromisoformat(_read(lock)["seen"])
        return max(0.0, (_now() - seen).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None


def _told(lock: bytes) -> str:
    """The holder in words."""
    found = _read(lock)
    if not {"pid", "host", "since"} <= found.keys():
        return "another process"
    silent = _silence(lock)
    heard = "" if silent is None else f", last heard of {_words(silent)} ago"
    return f"process {found['pid']} on {found['host']} since {found['since']}{heard}"


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
