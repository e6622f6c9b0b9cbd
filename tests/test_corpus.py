"""The corpus: which texts it includes, how it is split, and bad files."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ravine.training.data import corpus as corpus_module
from ravine.training.data import shards as shards_module
from ravine.training.data.batches import load_corpus, train_batches


def write_texts(folder: Path, count: int, size: int = 2000) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text(f"file {i} ünïcode ".ljust(size, "xyz"[i % 3]), encoding="utf-8")
    return paths


def test_default_is_the_standard_library(library):
    again = load_corpus()
    assert library.fingerprint == again.fingerprint
    np.testing.assert_array_equal(library.train, again.train)
    np.testing.assert_array_equal(library.heldout, again.heldout)
    total = len(library.train) + len(library.heldout)
    assert total > 5_000_000
    assert library.train.dtype == library.heldout.dtype == np.uint8
    assert 0.01 <= len(library.heldout) / total <= 0.20
    assert library.vocabulary == 256
    assert library.bytes_per_token == 1.0
    assert f"{total:,} bytes" in library.description
    assert "held out, by file" in library.description
    assert "\n" not in library.description
    text = library.train.tobytes() + library.heldout.tobytes()
    text.decode()
    assert b"\0" not in text
    assert Path(json.__file__).read_bytes() in text


def test_library_leaves_out_what_is_not_the_library(tmp_path, monkeypatch):
    kept = ["a.py", "sub/b.txt", "sub/c.rst"]
    left = [
        "site-packages/x.py",
        "sub/dist-packages/x.py",
        "lib2to3/x.py",
        "__pycache__/x.py",
        "config-3.11-x86_64-linux-gnu/x.py",
        "_sysconfigdata__linux.py",
        ".hidden.py",
        "d.html",
        "latin1.py",
        "nul.py",
        "empty.py",
    ]
    for name in kept + left:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"# " + name.encode() + b"\n" * 20)
    (tmp_path / "latin1.py").write_bytes("# é".encode("latin-1"))
    (tmp_path / "nul.py").write_bytes(b"# \0")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = load_corpus()
    text = np.concatenate([corpus.train, corpus.heldout]).tobytes()
    assert text == b"".join((tmp_path / name).read_bytes() for name in kept)
    assert "3 files" in corpus.description

    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none: no UTF-8 text"):
        load_corpus()


def test_split_is_by_content_and_independent_of_names(tmp_path):
    paths = write_texts(tmp_path, 200)
    corpus = load_corpus(paths)
    expected = ([], [])
    for path in paths:
        content = path.read_bytes()
        number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        expected[number % 20 == 0].append(content)
    assert corpus.train.tobytes() == b"".join(expected[0])
    assert corpus.heldout.tobytes() == b"".join(expected[1])
    assert expected[1]
    assert "200 files" in corpus.description
    assert "by file" in corpus.description

    # A held-out file that also exists under another name stays held out and counts once.
    twin = tmp_path / "zzz.txt"
    twin.write_bytes(expected[1][0])
    again = load_corpus([*paths, twin])
    assert again.fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(again.heldout, corpus.heldout)
    assert expected[1][0] not in again.train.tobytes()

    # The directory stands for its files in order; other content has another fingerprint.
    assert load_corpus([tmp_path]).fingerprint == corpus.fingerprint
    paths[0].write_text("something else")
    assert load_corpus(paths).fingerprint != corpus.fingerprint


def test_few_files_hold_out_the_tail(tmp_path):
    paths = write_texts(tmp_path, 3, size=1000)
    text = b"".join(path.read_bytes() for path in paths)
    corpus = load_corpus(paths)
    cut = len(text) - len(text) // 10
    assert corpus.train.tobytes() == text[:cut]
    assert corpus.heldout.tobytes() == text[cut:]
    assert corpus.description == (
        f"000.txt and 2 more: 3 files, {len(text):,} bytes, "
        "last 10% held out, too few files to split them"
    )
    assert ": 1 file, " in load_corpus(paths[:1]).description


def test_uneven_files_hold_out_the_tail(tmp_path):
    paths = write_texts(tmp_path, 30)
    large = tmp_path / "large.txt"
    large.write_bytes(b"a" * 10_000_000)
    corpus = load_corpus([*paths, large])
    assert "files too uneven" in corpus.description
    assert len(corpus.heldout) == (len(corpus.train) + len(corpus.heldout)) // 10


def test_directory_takes_text_and_leaves_the_rest(tmp_path):
    for name, content in {
        "b.md": b"second",
        "a/z": b"first",
        ".git/config": b"hidden",
        "image.png": b"\x89PNG\0",
        "late.dat": b"x" * 10_000 + b"\0",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus([tmp_path])
    assert np.concatenate([corpus.train, corpus.heldout]).tobytes() == b"firstsecond"
    assert corpus.description.startswith(tmp_path.name)


def test_bin_is_memory_mapped(tmp_path):
    path = tmp_path / "train.bin"
    tokens = np.random.default_rng(0).integers(0, 50257, 10_007)
    tokens[5000] = 50256
    tokens.astype("<u2").tofile(path)
    corpus = load_corpus([path])
    base = corpus.train
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    assert not corpus.train.flags.writeable
    assert corpus.train.dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.heldout]), tokens)
    assert len(corpus.heldout) == 1000
    assert corpus.vocabulary == 50304
    assert corpus.bytes_per_token is None
    assert "train.bin: 1 file, 20,014 bytes" in corpus.description
    assert load_corpus([path]).fingerprint == corpus.fingerprint
    assert load_corpus([path], vocabulary=65536).vocabulary == 65536
    rows = next(train_batches(corpus, batch_size=2, context=8, seed=0))
    assert rows.dtype == np.int32
    assert rows.shape == (2, 9)


@pytest.mark.parametrize(("largest", "vocabulary"), [(0, 64), (63, 64), (64, 128), (65535, 65536)])
def test_bin_vocabulary_is_a_multiple_of_64(tmp_path, largest, vocabulary):
    path = tmp_path / "t.bin"
    np.array([0, largest, 0], "<u2").tofile(path)
    assert load_corpus([path]).vocabulary == vocabulary


def test_large_bin_is_sampled_and_guarded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 100)
    monkeypatch.setattr(shards_module, "MOST_BLOCKS", 4)
    path = tmp_path / "t.bin"
    tokens = np.zeros(2000, "<u2")
    tokens[1999] = 99  # in the last block, which is always checked
    tokens[150] = 500  # in the second of 20 blocks, which is not
    tokens.tofile(path)
    corpus = load_corpus([path])
    assert corpus.vocabulary == 128
    with pytest.raises(ValueError, match=r"token 500 .* outside its vocabulary of 128"):
        list(itertools.islice(train_batches(corpus, batch_size=1, context=100, seed=0), 20))
    named = load_corpus([path], vocabulary=512)
    batches = train_batches(named, batch_size=1, context=100, seed=0)
    assert max(int(batch.max()) for batch in itertools.islice(batches, 20)) == 500

    # 32 GB of zeros, sparse on disk: opening it takes no time, because it is not read.
    monkeypatch.undo()
    with path.open("wb") as file:
        file.truncate(1 << 35)
    assert len(load_corpus([path]).train) == (1 << 34) - (1 << 34) // 10


# Bad input


def _binary(folder):
    (folder / "x.txt").write_bytes(b"ab\0cd")
    return [folder / "x.txt"]


def _late_binary(folder):
    (folder / "x.txt").write_bytes(b"a" * 10_000 + b"\0")
    return [folder / "x.txt"]


def _latin(folder):
    (folder / "x.txt").write_bytes("é".encode("latin-1"))
    return [folder / "x.txt"]


def _empty(name):
    def make(folder):
        (folder / name).write_bytes(b"")
        return [folder / name]

    return make


def _odd(folder):
    (folder / "x.bin").write_bytes(b"abc")
    return [folder / "x.bin"]


def _mixed(folder):
    (folder / "x.txt").write_text("text")
    (folder / "x.bin").write_bytes(b"abcd")
    return [folder / "x.txt", folder / "x.bin"]


def _no_text(folder):
    (folder / "x.png").write_bytes(b"\0")
    return [folder]


def _pipe(folder):
    os.mkfifo(folder / "x.txt")
    return [folder / "x.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "x.txt"], r"x\.txt: no such file or directory; fix the path"),
        (lambda folder: [folder / "x.bin"], r"x\.bin: no such file or directory; fix the path"),
        (_pipe, r"x\.txt: a pipe or a device"),
        (_empty("x.txt"), r"x\.txt: the file is empty; fill it or leave it out"),
        (_empty("x.bin"), r"x\.bin: the file is empty; fill it or leave it out"),
        (_binary, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_late_binary, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_latin, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_odd, r"x\.bin: 3 bytes, odd"),
        (_mixed, r"x\.txt is no \.bin and stands beside one; give one kind"),
        (_no_text, "no UTF-8 text in this directory; name"),
    ],
)
def test_bad_files(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_bad_vocabulary(tmp_path):
    path = tmp_path / "t.bin"
    np.array([7, 300], "<u2").tofile(path)
    with pytest.raises(ValueError, match="token 300 needs a vocabulary above it, got 300"):
        load_corpus([path], vocabulary=300)
    text = write_texts(tmp_path, 1)
    with pytest.raises(ValueError, match="at least 256 for bytes"):
        load_corpus(text, vocabulary=255)


@pytest.mark.parametrize("files", [1, 200])
def test_train_and_heldout_are_disjoint(tmp_path, files):
    for i in range(files):  # every line occurs exactly once
        lines = (f"{i:04} {j:06}\n" for j in range(8000 // files + 50))
        (tmp_path / f"{i:03}.txt").write_text("".join(lines))
    corpus = load_corpus([tmp_path])
    train = set(corpus.train.tobytes().split(b"\n"))
    heldout = set(corpus.heldout.tobytes().split(b"\n"))
    # A cut in the middle of a line leaves a piece of it on each side.
    assert {line for line in train & heldout if len(line) == 11} == set()
    assert len(heldout) > 50
