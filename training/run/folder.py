"""The folder of a race: who holds it, what a race has written in it, and what may be removed.

Nothing of the user's is ever deleted: `race.json` lists the files that its race writes, and
`--overwrite` removes these and no other. A folder that holds anything else, a link included, is refused
as it is.
"""

import contextlib
import datetime
import json
import os
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from ..config import decisive
from .files import read_json, said, write_json
from .seal import SEAL

RACE, REPORT, LOCK, HOLDER = "race.json", "report.html", "race.lock", "race.lock.json"
META, METRICS, OUTCOME, CHECKPOINTS = "meta.json", "metrics.jsonl", "outcome.json", "checkpoints"
REFUSED, SAMPLES = "checkpoints-refused", "samples.txt"
_OF_A_STEP = re.compile(r"\d+(\.\d+)?(\.orbax-checkpoint-tmp[^/]*)?")
# A checkpoint that was never sealed has no list: these are the names that Orbax and TensorStore give.
_OF_ORBAX = re.compile(
    r"(_CHECKPOINT_METADATA|_METADATA|_sharding|_strings\.json|commit_success\.txt|manifest\.ocdbt|"
    r"descriptor\.pbtxt|process_\d+|[0-9a-f]{32}|files\.json(\.tmp)?)(\.__lock)?"
)


@contextlib.contextmanager
def claimed(
    out: Path, identity: dict[str, Any], *, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """The folder, held by this process: ready for the race, or with the race that goes on.

    Args:
      out: the folder; made where it is missing.
      identity: JSON values that decide the results; the runs' folders are named by the keys of its
        ``optimizers``.
      overwrite: remove what an earlier race has written there.
      resume: go on with the race of the same identity that is there.

    Raises:
      ValueError: for a folder that is in use, cannot be written, or holds anything else. Nothing in it
        is changed then.
    """
    with contextlib.ExitStack() as held:
        try:
            _removable(out, identity, overwrite, resume)  # refused before a lock is left there
            out.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(str(out / LOCK), blocking=False)
            try:
                held.enter_context(lock)
            except filelock.Timeout:
                message = f"{out} is in use by {_holder(out)}; wait for it or give another --out."
                raise ValueError(message) from None
            # Not in the lock itself: some versions of filelock empty it when they acquire it.
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            write_json(out / HOLDER, holder)
            held.callback(_forget, out / HOLDER)
            files, folders = _removable(out, identity, overwrite, resume)
            for file in files:
                file.unlink()
            for folder in folders:
                folder.rmdir()
            if not resume or _manifest(out) != {
                **identity,
                "writes": _writes(identity["optimizers"]),
            }:
                manifest = {**identity, "writes": _writes(identity["optimizers"])}
                write_json(out / RACE, manifest)
        except OSError as error:
            raise ValueError(
                f"{said(error)}; the results cannot be written to {out}; give another --out."
            ) from error
        yield out


def is_race(folder: Path) -> bool:
    """Whether a race has written in this folder."""
    try:
        return _manifest(folder) is not None
    except (OSError, ValueError):
        return False


def _writes(names: Collection[str]) -> list[str]:
    """The paths that a race writes; of those that end in a slash, what Orbax puts there."""
    inner = (META, METRICS, OUTCOME, SAMPLES, f"{CHECKPOINTS}/", f"{REFUSED}/")
    return [RACE, REPORT, LOCK, HOLDER, *(f"{name}/{file}" for name in names for file in inner)]


def _manifest(out: Path) -> dict[str, Any] | None:
    if not (out / RACE).is_file():
        return None
    fix = f"if {out} is a race's, move it away by hand; otherwise give another --out"
    found = read_json(out / RACE, fix)
    listed = found.get("writes")
    return found if isinstance(listed, list) and all(isinstance(x, str) for x in listed) else None


def _removable(
    out: Path, identity: dict[str, Any], overwrite: bool, resume: bool
) -> tuple[list[Path], list[Path]]:
    """The files and folders to remove, folders after what is in them, or why the folder is refused."""
    if not os.path.lexists(out):
        if resume:
            raise ValueError(f"{out} does not exist; --resume needs the --out of an earlier race.")
        return [], []
    if not out.is_dir():
        raise ValueError(f"{out} is not a folder; give --out one.")
    ours = {name + end for name in (LOCK, HOLDER, RACE) for end in ("", ".tmp")} - {RACE}
    empty = ours.issuperset(os.listdir(out))
    found = _manifest(out)
    if resume:
        if found is None:
            raise ValueError(f"{out} holds no race; --resume needs the --out of an earlier one.")
        theirs, mine = _decisive(found), _decisive(identity)
        differing = [name for name in mine if theirs.get(name) != mine[name]]
        if differing:
            raise ValueError(
                f"{out} holds a race of another {' and '.join(differing)} "
                f"({_difference(theirs, mine)}); repeat its flags, or give another --out."
            )
        return [], []
    if empty:
        return [], []
    if found is None:
        raise ValueError(f"{out} holds files that are not a race's; give --out another folder.")
    if not overwrite:
        raise ValueError(f"{out} holds another run; give --overwrite or another --out.")
    if out.is_symlink():
        raise ValueError(f"{out} is a link; give --out the folder itself, {out.resolve()}.")
    files, folders, others = _sorted(out, found["writes"])
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{out} holds what no race has written ({', '.join(map(str, others[:3]))}{more}), and "
            "--overwrite removes only a race's files; move it away or give another --out."
        )
    return files, folders


def _decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """Without what may change when a race is resumed."""
    told = identity.get("configuration")
    if not (isinstance(told, dict) and isinstance(told.get("run"), dict)):
        return identity
    return {**identity, "configuration": {**told, "run": decisive(told["run"])}}


def _difference(found: Any, identity: Any) -> str:
    """The first value that differs, by its name."""
    for name, mine in identity.items():
        theirs = found.get(name)
        if theirs != mine:
            if isinstance(mine, dict) and isinstance(theirs, dict):
                missing = {key: None for key in theirs if key not in mine}
                return _difference(theirs, {**mine, **missing})
            return f"{name} is {theirs!r} there and {mine!r} here"
    return ""


def _sorted(out: Path, writes: list[str]) -> tuple[list[Path], list[Path], list[Path]]:
    """What a race has written: files, folders; and what it has not. Links are not followed."""
    files, folders, others = [], [], []
    expected = {str(parent) for path in writes for parent in PurePosixPath(path).parents}
    stores = {path.rstrip("/") for path in writes if path.endswith("/")}

    def visit(folder: Path, sealed: set[str] | None, step: Path | None) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(out).as_posix()
            if entry.is_symlink():
                others.append(path)
            elif entry.is_dir(follow_symlinks=False):
                begins = path.parent.relative_to(out).as_posix() in stores
                if begins and _OF_A_STEP.fullmatch(entry.name):
                    visit(path, _sealed(path), path)
                elif step is not None or name in expected or name in stores:
                    visit(path, sealed, step)
                else:
                    others.append(path)
                    continue
                folders.append(path)
            elif step is not None:
                inner = path.relative_to(step).as_posix()
                known = inner.removesuffix(".tmp") == SEAL or (
                    _OF_ORBAX.fullmatch(entry.name) if sealed is None else inner in sealed
                )
                (files if known else others).append(path)
            elif name in (RACE, LOCK, HOLDER):  # replaced, and held
                continue
            else:
                (files if name.removesuffix(".tmp") in writes else others).append(path)

    visit(out, None, None)
    return files, folders, others


def _sealed(checkpoint: Path) -> set[str] | None:
    """The files of a checkpoint that its seal lists; none without a seal."""
    try:
        return set(json.loads((checkpoint / SEAL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _holder(out: Path) -> str:
    try:
        found = read_json(out / HOLDER, "")
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _forget(holder: Path) -> None:
    with contextlib.suppress(OSError):
        holder.unlink()
