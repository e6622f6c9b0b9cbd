"""The seal of a checkpoint: its files with their sizes and SHA-256, on a disk or in a bucket."""

import concurrent.futures
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from ..data.buckets import orbax_writes, refusals, url_of
from .files import said, write_text

SEAL = "files.json"
_BLOCK = 1 << 25  # bytes that are requested from a bucket at once


def write_seal(folder: Path) -> None:
    """Adds the seal to a checkpoint that is whole."""
    files, root = _opened(folder)
    text = json.dumps(_contents(files, _files(files, root)), indent=2) + "\n"
    if url_of(folder):
        files.pipe_file(f"{root}/{SEAL}", text.encode())
    else:
        write_text(folder / SEAL, text)


def complaint_of(folder: Path, only: Collection[str] | None = None) -> str:
    """What is wrong with a checkpoint; empty for one that is intact.

    Args:
      folder: of the checkpoint.
      only: the files whose contents are compared; all of them by default.

    Raises:
      ValueError: for a bucket that cannot be read.
    """
    url = url_of(folder)
    if not url:
        return _complaint(folder, only)
    with refusals(url):
        return _complaint(folder, only)


def _complaint(folder: Path, only: Collection[str] | None) -> str:
    files, root = _opened(folder)
    try:
        listed = json.loads(files.cat_file(f"{root}/{SEAL}"))
        sizes = {name: content["bytes"] for name, content in listed.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"was cut off ({SEAL}, which is written last, is missing or damaged)"
    try:
        there = _files(files, root)
        for name, size in sizes.items():
            found = there[name]["size"] if name in there else "no"
            if found != size:
                return f"was cut off ({name} has {found} of {size} bytes)"
        compared = {name: there[name] for name in listed if only is None or name in only}
        for name, content in _contents(files, compared).items():
            if content != listed[name]:
                return f"is damaged ({name} does not have the content that was written)"
    except OSError as error:
        return f"cannot be read ({said(error)})"
    return ""


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none if it is not there.

    Raises:
      ValueError: for a bucket that cannot be read.
    """
    if not (url := url_of(folder)):
        return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    with refusals(url):
        files, root = _opened(folder)
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
        except FileNotFoundError:
            return []


def move(folder: Path, to: Path) -> None:
    """Gives a folder another place; in a bucket every object of it is copied and removed.

    Raises:
      ValueError: for a bucket where that fails.
    """
    if not (url := url_of(folder)):
        to.parent.mkdir(exist_ok=True)
        folder.rename(to)
        return
    with refusals(url):
        files, root = _opened(folder)
        files.mv(root, files._strip_protocol(url_of(to)), recursive=True)


def _opened(folder: Path) -> tuple[Any, str]:
    """The file system of a folder, and its path there."""
    if not (url := url_of(folder)):
        return fsspec.filesystem("file"), str(folder.absolute())
    if orbax_writes(
        folder
    ):  # with the arguments of etils, so that Orbax forgets its listings as well
        files = fsspec.filesystem("gcs", finalize_on_close=True)
        root = files._strip_protocol(url)
    else:
        files, root = url_to_fs(url)
    files.invalidate_cache()
    return files, root


def _files(files: Any, root: str) -> dict[str, dict[str, Any]]:
    """What lies in a folder by its names there, but for the seal."""
    found = files.find(root, detail=True)
    names = {
        path.removeprefix(f"{root}/"): {**entry, "path": path} for path, entry in found.items()
    }
    return {name: names[name] for name in sorted(names) if name.rpartition("/")[2] != SEAL}


def _contents(files: Any, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, several at a time: hashing leaves other threads alone."""

    def content(entry: dict[str, Any]) -> dict[str, Any]:
        with files.open(entry["path"], "rb", block_size=_BLOCK) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": entry["size"], "sha256": digest}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(found, pool.map(content, found.values()), strict=True))
