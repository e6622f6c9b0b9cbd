"""Text and tokens in buckets, `gs://`, `s3://` and what else fsspec opens; the rest is on a disk."""

import contextlib
import dataclasses
import errno
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk, and of a quota."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


def url_of(path: Path) -> str:
    """The URL that a path was made from; empty for a path on a local disk.

    `pathlib` joins the two slashes of a URL to one, and no sensible folder has a name such as ``gs:``.

    Example:
      >>> from pathlib import Path
      >>> from ravine.training.data.buckets import url_of
      >>> url_of(Path("gs://bucket/text")), url_of(Path("text"))
      ('gs://bucket/text', '')
    """
    found = _SCHEME.fullmatch(path.parts[0]) if path.parts else None
    if found is None:
        return ""
    slashes = ":///" if found[1] == "file" else "://"
    return found[1] + slashes + "/".join(path.parts[1:])


def named(path: Path) -> str:
    """A path as messages have it: its URL, if it was made from one."""
    return url_of(path) or str(path)


def absolute(path: Path) -> Path:
    """A path that does not depend on the current folder; a URL never does."""
    return path if url_of(path) else path.absolute()


def orbax_writes(path: Path) -> bool:
    """Whether a path is in a bucket into which Orbax writes itself, from every process."""
    return url_of(path).startswith("gs://")


def check_local(config: Any) -> None:
    """Refuses paths in buckets but for those of data, and those of fields that may have one.

    Raises:
      ValueError: for the first, by its flag, or for a bucket that cannot be reached.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_local(value)
        elif "bucket" in field.metadata:
            if value is not None and (url := url_of(value)):
                reach(url)
        elif isinstance(value, Path):
            refuse_bucket(f"--{field.name.replace('_', '-')}", Path(value))


def refuse_bucket(flag: str, path: Path) -> None:
    """Refuses a path that is a URL.

    Raises:
      ValueError: with the fix.
    """
    if url := url_of(path):
        raise ValueError(
            f"{flag} {url}: only data, profiles, and the --out, --branch-from and --tensorboard of a "
            "race may be in a bucket; give a local path, or the folder where the bucket is mounted."
        )


def reach(url: str) -> None:
    """Refuses a URL that nothing opens, and a bucket that does not answer.

    Raises:
      ValueError: in a line.
    """
    with refusals(url), contextlib.suppress(FileNotFoundError):
        files, root = url_to_fs(url)
        files.ls(root, detail=False)


def read_texts(url: str, hidden: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of a file, by an empty name, or of all files below a folder, by their paths in it.

    Args:
      url: of either.
      hidden: how names begin that are passed over.

    Raises:
      ValueError: in a line, for what is not there or cannot be read.
    """
    with refusals(url):
        files, root = url_to_fs(url)
        if files.info(root)["type"] == "file":
            return {"": files.cat_file(root)}
        found = {PurePosixPath(p).relative_to(root).as_posix(): p for p in files.find(root)}
        # The results of races beside a text are not part of it.
        races = {PurePosixPath(name).parent for name in found if name.endswith("/race.json")}
        return {
            name: files.cat_file(path)
            for name, path in sorted(found.items())
            if not any(part.startswith(hidden) for part in name.split("/"))
            and races.isdisjoint(PurePosixPath(name).parents)
        }


@contextlib.contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """A copy of a file on the local disk, in the system's folder for temporary files.

    It has a name as long as this is entered; a mapping of it into memory outlives that.

    Raises:
      ValueError: in a line, for what is not there, is a folder or cannot be read, or for a full disk.
    """
    with tempfile.NamedTemporaryFile(prefix="ravine-", suffix=".bin") as file:
        with refusals(url):
            files, root = url_to_fs(url)
            found = files.info(root)
            if found["type"] != "file":
                raise ValueError("a folder, and a .bin is a file")
            files.get_file(root, file.name)
            size = Path(file.name).stat().st_size
            if size != found["size"]:
                raise ValueError(f"{size} of {found['size']} bytes came, or it changed meanwhile")
        yield Path(file.name)


def no_room(url: str, error: OSError) -> str:
    """What to do about a full disk under the temporary folder that a bucket needs."""
    return f"{url}: {error.strerror} in {tempfile.gettempdir()}; set TMPDIR to a folder with room."


@contextlib.contextmanager
def refusals(url: str, passes: Any = ()) -> Iterator[None]:
    """What services raise, each in its own way, as a `ValueError` of one sentence, but for `passes`."""
    try:
        yield
    except passes:
        raise
    except FileNotFoundError:
        raise ValueError(f"{url}: no such file or folder; fix the URL.") from None
    except ImportError as error:
        raise ValueError(f"{url}: {error}; pip install what it needs.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise ValueError(no_room(url, error)) from error
        line = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"{url}: {kind}{line}; fix the URL, or the credentials that its service needs."
        ) from error
