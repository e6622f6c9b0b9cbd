"""Files as a run writes and reads them: strict JSON, and whole or as they were before."""

import contextlib
import errno
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Line = TypeVar("Line")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a disk, a quota or a file that takes no more, or of a disk that failed."""


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become ``null``, which every reader accepts.

    Example:
      >>> from ravine.training.run.files import dumps
      >>> dumps({"loss": float("nan"), "step": 3})
      '{"loss": null, "step": 3}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def write_text(file: Path, text: str) -> None:
    """Writes a file that is there whole, or as it was before."""
    with _draft(file) as draft:
        # A path that is not UTF-8 has characters that cannot be encoded.
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_figure(figure: Any, file: Path, dpi: int) -> None:
    """Writes a figure of Matplotlib, in the format of the file's ending, whole or not at all."""
    with _draft(file) as draft:
        figure.savefig(draft, dpi=dpi, format=file.suffix[1:])


@contextlib.contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """A file beside another, which it replaces in the end; it is removed where it cannot be written."""
    draft = file.with_name(file.name + ".tmp")
    try:
        with naming(draft):
            yield draft
            draft.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def write_json(file: Path, value: Any) -> None:
    """Writes strict JSON, whole or not at all."""
    write_text(file, dumps(value, indent=2) + "\n")


def read_json(file: Path, fix: str) -> dict[str, Any]:
    """The object in a file.

    Args:
      file: what to read.
      fix: what to do about a damaged one, the end of the error's sentence.

    Raises:
      ValueError: if the file is not one JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged (not JSON: {error}); {fix}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged (not a JSON object); {fix}.")
    return value


def read_lines(file: Path, take: Callable[[Any], Line], fix: str) -> list[Line]:
    """What `take` makes of the JSON values in a file, one per line.

    Args:
      file: what to read.
      take: makes something of a line's value; it may raise KeyError, TypeError, ValueError or
        AttributeError for a value of another form.
      fix: what to do about a damaged line, the end of the error's sentence.

    Raises:
      ValueError: for a line that is damaged, by its number.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(take(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is damaged in line {number}; {fix}.") from None
    return found


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the name of the file into an `OSError` that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(file)) from error
        raise


def said(error: OSError) -> str:
    """An `OSError` in words: the file, then what is wrong with it."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


class Lines:
    """A file that grows by whole lines, each on disk before the next is made."""

    def __init__(self, file: Path):
        self._name = file
        # Without a buffer nothing is left over that a full disk refuses again when the file is closed.
        self._file = file.open("ab", buffering=0)

    def write(self, value: Any) -> None:
        """Appends one JSON value; where that fails, nothing of it stays."""
        left = (dumps(value) + "\n").encode()
        before = self._file.tell()
        with naming(self._name):
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(before)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
