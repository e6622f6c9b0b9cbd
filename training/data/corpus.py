"""Files become a corpus: tokens to train on, and tokens held out.

Bytes are the tokens by default: no tokenizer to fetch, 256 symbols, and a loss in bits per byte,
which can be compared between models. The default text is the one every Python carries, its library.
A file of tokens, raw uint16 in the manner of nanoGPT, stays on disk and is read where it is needed.

The content of each file decides whether it is held out, not its place or name: a file keeps its
side when others come or go, and one that is there twice cannot be on both.
"""

import contextlib
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..run.folder import is_race
from .buckets import downloaded, named, read_texts, url_of
from .shards import Stamp, inspected, stamp_of, tokens_of

_HELDOUT_EVERY = 20  # one file in so many, by hash: 5 %
_FEWEST_FILES = 20  # below this, whole files are too coarse a split
_HELDOUT_SHARES = (0.01, 0.20)  # beyond these, a few large files have made it lopsided
_TAIL_PART = 10  # then the last tenth of the tokens is held out instead

_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
_HIDDEN = (".", "__pycache__")  # how names that are passed over begin
# The last two are written when Python is built and differ from machine to machine.
_NOT_LIBRARY = (*_HIDDEN, "site-packages", "dist-packages", "lib2to3", "config-", "_sysconfigdata")

_BINARY = "not UTF-8 text; convert it, or name it *.bin if uint16 tokens."
_NO_TEXT = "no UTF-8 text in this directory; name text files or another one."
_EMPTY = "the file is empty; fill it or leave it out."


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on, tokens held out, and facts about them.

    Attributes:
      train: the training tokens, [N], uint8 (bytes), uint16 (.bin, memory-mapped, read-only), or of
        a tokenizer uint16 or uint32; of several shards, those of the first.
      heldout: the held-out tokens, [H], of the same dtype; no file is on both sides.
      vocabulary: every token lies in [0, vocabulary).
      bytes_per_token: 1.0 for bytes, None where it is unknown; it turns nats per token into bits
        per byte.
      description: one line: what it is, how many files, bytes, and what is held out.
      fingerprint: 16 hexadecimal digits of a SHA-256 over the content; equal for equal corpora.
      files: of .bin files on disk, which are read as they are needed: their paths, and their sizes,
        times and inodes when they were opened.
      decode: from tokens to their text, where a tokenizer made them.
      more: the training tokens of all shards but the first.
      fixed: whether held-out tokens were given as such: they are used from the first on, by all.
    """

    train: np.ndarray = field(repr=False)
    heldout: np.ndarray = field(repr=False)
    vocabulary: int
    bytes_per_token: float | None
    description: str
    fingerprint: str
    files: tuple[tuple[Path, Stamp], ...] = field(default=(), repr=False)
    decode: Callable[[np.ndarray], str] | None = field(default=None, repr=False)
    more: tuple[np.ndarray, ...] = field(default=(), repr=False)
    fixed: bool = False

    @property
    def shards(self) -> tuple[np.ndarray, ...]:
        """The training tokens of every shard."""
        return (self.train, *self.more)

    def for_tuning(self) -> "Corpus":
        """With the first half of the held-out tokens only: what hyperparameters are chosen by."""
        if self.fixed:
            return self
        return replace(self, heldout=self.heldout[: len(self.heldout) // 2])

    def for_races(self) -> "Corpus":
        """With the second half of the held-out tokens only, which no choice has seen."""
        if self.fixed:
            return self
        return replace(self, heldout=self.heldout[len(self.heldout) // 2 :])

    def check_unchanged(self) -> None:
        """Raises an `OSError` if a .bin is not what it was; reading beyond its end is fatal."""
        for path, stamp in self.files:
            try:
                same = stamp_of(path) == stamp
            except OSError as error:
                raise OSError(f"{path} disappeared while it was read ({error.strerror})") from error
            if not same:
                raise OSError(
                    f"{path} has changed while it is read; a run needs its text as it was"
                )


def load_corpus(
    paths: Sequence[Path] = (), *, vocabulary: int | None = None, heldout: Sequence[Path] = ()
) -> Corpus:
    """The corpus made of `paths`, or of Python's own standard library.

    Text files are joined in the order given, those of a directory in the order of their paths below
    it, without hidden, empty and binary ones and without the folders of races; a file with the content
    of an earlier one is dropped.
    One file in 20 is held out, by the SHA-256 of its content. With fewer than 20 files, or if that
    held out less than 1 % or more than 20 % of the bytes, the last 10 % of the tokens are held out
    instead, and the description says so.

    Args:
      paths: UTF-8 text files, directories of them, or files of little-endian uint16 tokens named
        `*.bin`, see :mod:`.shards`; each also in a bucket (``gs://``, ``s3://``, whatever fsspec has
        the package for), from where text is read into memory, and tokens are copied to temporary
        files, which are mapped and have no names. Default: the `.py`, `.txt` and `.rst`
        files of the running Python's standard library, about 30 MB (less where a distribution packs
        its tests separately).
      vocabulary: the number of tokens. Default: 256 for bytes; for a `.bin`, its largest token plus
        one, rounded up to a multiple of 64 (GPT-2's 50257 tokens give 50304). Of a `.bin` of more
        than 64 Mi tokens only that many, evenly spread, are inspected, for this and for the
        fingerprint; a token beyond the vocabulary is then an error when it is met.
      heldout: `*.bin` files of held-out tokens, beside `*.bin` files; all of `paths` are then for
        training, nothing is split off, and held-out tokens are used from the first on.

    Raises:
      ValueError: one line that names the file and the fix: a path missing, empty or unreadable,
        text not UTF-8, a `.bin` that is no tokens or beside other files, a vocabulary too small.

    Example:
      >>> from ravine.training.data.batches import load_corpus
      >>> corpus = load_corpus()
      >>> corpus.vocabulary, corpus.bytes_per_token, corpus.train.dtype.name
      (256, 1.0, 'uint8')
    """
    paths, heldout = list(map(Path, paths)), list(map(Path, heldout))
    tokens, given = list(map(_is_tokens, paths)), list(map(_is_tokens, heldout))
    if any(tokens):
        others = [path for path, is_tokens in zip(paths, tokens, strict=True) if not is_tokens]
        others += [path for path, is_tokens in zip(heldout, given, strict=True) if not is_tokens]
        if others:
            raise ValueError(
                f"{named(others[0])} is no .bin and stands beside one; give one kind only."
            )
        return _tokens(paths, heldout, vocabulary)
    if heldout:
        raise ValueError(
            f"heldout {named(heldout[0])} needs data in .bin files; leave it out, text is split by "
            "itself."
        )
    if vocabulary is not None and vocabulary < 256:
        raise ValueError(f"vocabulary must be at least 256 for bytes, got {vocabulary}.")
    if not paths:
        name = f"standard library of Python {platform.python_version()}"
        library = _folder(Path(sysconfig.get_path("stdlib")), _NOT_LIBRARY, _LIBRARY_SUFFIXES)
        return _bytes(name, library, vocabulary)
    first = paths[0] if url_of(paths[0]) else Path(os.path.realpath(paths[0]))
    name = first.name + (f" and {len(paths) - 1} more" if paths[1:] else "")
    return _bytes(name, (content for path in paths for content in _given(path)), vocabulary)


def _bytes(name: str, contents: Iterable[bytes], vocabulary: int | None) -> Corpus:
    files = {hashlib.sha256(content).digest(): content for content in contents}
    sides: tuple[list[bytes], list[bytes]] = [], []
    for key, content in files.items():
        sides[int.from_bytes(key[:8], "big") % _HELDOUT_EVERY == 0].append(content)
    total = sum(map(len, files.values()))
    share = sum(map(len, sides[1])) / total
    few = len(files) < _FEWEST_FILES
    if few or not _HELDOUT_SHARES[0] <= share <= _HELDOUT_SHARES[1]:
        train, heldout = _cut_tail(np.frombuffer(b"".join(files.values()), np.uint8))
        split = f"last 10% held out, {'too few files' if few else 'files too uneven'} to split them"
    else:
        train, heldout = (np.frombuffer(b"".join(side), np.uint8) for side in sides)
        split = f"{share:.1%} held out, by file"
    return Corpus(
        train=train,
        heldout=heldout,
        vocabulary=vocabulary or 256,
        bytes_per_token=1.0,
        description=f"{name}: {len(files)} file{'s' * (len(files) > 1)}, {total:,} bytes, {split}",
        fingerprint=hashlib.sha256(b"".join(files)).hexdigest()[:16],
    )


def _is_tokens(path: Path) -> bool:
    return path.suffix == ".bin" and not os.path.isdir(path)


def _tokens(paths: list[Path], heldout: list[Path], vocabulary: int | None) -> Corpus:
    every = [*paths, *heldout]
    if repeated := {path for path in every if every.count(path) > 1}:
        raise ValueError(f"{named(min(repeated))} is given twice; name each file once.")
    shards, stamps = zip(*map(_opened, every), strict=True)
    sizes = " ".join(str(size) for size, _, _ in stamps)
    sizes += f" {len(heldout)} held out" if heldout else ""
    digest, largest = hashlib.sha256(sizes.encode()), 0
    for path, shard in zip(every, shards, strict=True):
        highest = inspected(shard, digest, len(shards))
        if vocabulary is not None and vocabulary <= highest:
            raise ValueError(
                f"{named(path)}: token {highest} needs a vocabulary above it, got {vocabulary}."
            )
        largest = max(largest, highest)
    train, held = list(shards[: len(paths)]), list(shards[len(paths) :])
    split = f"{sum(map(len, held)):,} given tokens held out" if held else "last 10% held out"
    if not held:
        if paths[1:]:
            split = "last 10% of the last file held out"
        train[-1], tail = _cut_tail(train[-1])
        held = [tail]
    size = sum(2 * len(shard) for shard in shards[: len(paths)])
    name = paths[0].name + (f" and {len(paths) - 1} more" if paths[1:] else "")
    count = f"{len(paths)} file{'s' * (len(paths) > 1)}"
    return Corpus(
        train=train[0],
        heldout=held[0] if len(held) == 1 else np.concatenate(held),
        vocabulary=vocabulary or -(-(largest + 1) // 64) * 64,
        bytes_per_token=None,
        description=f"{name}: {count}, {size:,} bytes, uint16 tokens, {split}",
        fingerprint=digest.hexdigest()[:16],
        files=tuple(x for x in zip(every, stamps, strict=True) if not url_of(x[0])),
        more=tuple(train[1:]),
        fixed=bool(heldout),
    )


def _opened(path: Path) -> tuple[np.ndarray, Stamp]:
    """The tokens of a .bin on disk, or of a copy that is nobody else's and so cannot change."""
    url = url_of(path)
    with downloaded(url) if url else contextlib.nullcontext(path) as file:
        _size(file, url)
        stamp = stamp_of(file)
        return tokens_of(file, url), stamp


def _cut_tail(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cut = len(tokens) - len(tokens) // _TAIL_PART
    return tokens[:cut], tokens[cut:]


def _given(path: Path) -> list[bytes]:
    if url := url_of(path):
        return _fetched(url)
    if os.path.isdir(path):
        return _folder(path, _HIDDEN)
    _size(path)
    content = _text(path)
    if content is None:
        raise ValueError(f"{path}: {_BINARY}")
    return [content]


def _fetched(url: str) -> list[bytes]:
    """As `_given`, from a bucket."""
    found = read_texts(url, _HIDDEN)
    texts = [content for content in found.values() if content and _is_text(content)]
    if texts:
        return texts
    if "" not in found:
        raise ValueError(f"{url}: {_NO_TEXT}")
    raise ValueError(f"{url}: {_BINARY if found[''] else _EMPTY}")


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _folder(root: Path, skip: tuple[str, ...], endings: tuple[str, ...] = ("",)) -> list[bytes]:
    """The texts under a directory, sorted by path, without names that begin with one of `skip`."""
    paths = []
    for folder, inner, names in os.walk(root, onerror=_unreadable):
        # The results of races beside a text are not part of it: it would change as they are written.
        inner[:] = [
            name for name in inner if not name.startswith(skip) and not is_race(Path(folder, name))
        ]
        wanted = [name for name in names if name.endswith(endings) and not name.startswith(skip)]
        paths += filter(Path.is_file, (Path(folder, name) for name in wanted))
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    if contents := [content for content in map(_text, paths) if content]:
        return contents
    raise ValueError(f"{root}: {_NO_TEXT}")


def _unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):  # removed since its name was read
        return
    raise ValueError(
        f"{error.filename}: {error.strerror}; make it readable or leave it out."
    ) from error


def _text(path: Path) -> bytes | None:
    """The content of a file of UTF-8 text; None if it is binary."""
    try:
        with path.open("rb") as file:
            content = file.read(8192)
            if b"\0" in content:  # no need to read gigabytes to find out
                return None
            content += file.read()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; make it readable or leave it out.") from error
    return content if _is_text(content) else None


def _size(path: Path, name: str = "") -> int:
    """The size in bytes of a file that must be there and hold something."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{name or path}: a pipe or a device; write it to a file, which is read.")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file or directory; fix the path, from {Path.cwd()}.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: may not be read; make it readable or leave it out.")
    if size := os.path.getsize(path):
        return size
    raise ValueError(f"{name or path}: {_EMPTY}")
