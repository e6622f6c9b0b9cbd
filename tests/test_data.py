"""Corpus and batches: the split, bad input, order, processes, positions that can be restored."""

import doctest
import hashlib
import itertools
import json
import os
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from ravine.training import corpus as corpus_module
from ravine.training import data as data_module
from ravine.training.data import Corpus, heldout_batches, load_corpus, train_batches


def counting_corpus(tokens: int = 1000, heldout: int = 200) -> Corpus:
    """Token i is i, so a batch tells where it was taken from."""
    numbers = np.arange(tokens + heldout, dtype=np.uint16)
    return Corpus(
        train=numbers[:tokens],
        heldout=numbers[tokens:],
        vocabulary=1 << 16,
        bytes_per_token=None,
        description="numbers",
        fingerprint="0" * 16,
    )


def take(batches, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(batches, count)))


def write_texts(folder: Path, count: int, size: int = 2000) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text(f"file {i} ünïcode ".ljust(size, "xyz"[i % 3]), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def library() -> Corpus:
    return load_corpus()


# The corpus


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

    # A held-out file that is there again under another name stays held out, and counts once.
    twin = tmp_path / "zzz.txt"
    twin.write_bytes(expected[1][0])
    again = load_corpus([*paths, twin])
    assert again.fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(again.heldout, corpus.heldout)
    assert expected[1][0] not in again.train.tobytes()

    # The directory is its files in order; other content is another fingerprint.
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
    monkeypatch.setattr(corpus_module, "_BLOCK", 100)
    monkeypatch.setattr(corpus_module, "_MOST_BLOCKS", 4)
    path = tmp_path / "t.bin"
    tokens = np.zeros(2000, "<u2")
    tokens[1999] = 99  # in the last block, which is always looked at
    tokens[150] = 500  # in the second of 20, which is not
    tokens.tofile(path)
    corpus = load_corpus([path])
    assert corpus.vocabulary == 128
    with pytest.raises(ValueError, match=r"token 500 .* outside its vocabulary of 128"):
        take(train_batches(corpus, batch_size=1, context=100, seed=0), 20)
    named = load_corpus([path], vocabulary=512)
    assert take(train_batches(named, batch_size=1, context=100, seed=0), 20).max() == 500

    # 32 GB of nothing, sparse on disk: opened in no time, because it is not read.
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
        (lambda folder: [folder / "x.txt"], r"x\.txt: no such file or directory; mend the path"),
        (lambda folder: [folder / "x.bin"], r"x\.bin: no such file or directory; mend the path"),
        (_pipe, r"x\.txt: no such file"),
        (_empty("x.txt"), r"x\.txt: the file is empty; fill it or leave it out"),
        (_empty("x.bin"), r"x\.bin: the file is empty; fill it or leave it out"),
        (_binary, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_late_binary, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_latin, r"x\.txt: not UTF-8 text; .* \*\.bin"),
        (_odd, r"x\.bin: 3 bytes, odd"),
        (_mixed, r"x\.txt, .*x\.bin: a \.bin must be the only path; `cat`"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"context": 2.0}, "context must be a whole number of at least 1, got 2.0"),
        ({"shard_count": 3}, "batch_size 8 cannot be cut into 3 shards"),
        ({"shard_count": 2, "shards": (0, 2)}, r"shards must lie in \[0, 2\), got \(0, 2\)"),
        ({"context": 1000}, r"numbers: the training part has 1,000 tokens and at least 1,001"),
    ],
)
def test_bad_arguments(arguments, message):
    wanted = {"batch_size": 8, "context": 10, "seed": 0} | arguments
    with pytest.raises(ValueError, match=message):
        train_batches(counting_corpus(), **wanted)


def test_heldout_part_too_short_names_the_file(tmp_path):
    corpus = load_corpus(write_texts(tmp_path, 1, size=100))
    with pytest.raises(
        ValueError, match=r"000\.txt: .* held-out part has 10 tokens .* at least 65"
    ):
        heldout_batches(corpus, batch_size=4, context=16, batches=1)
    with pytest.raises(ValueError, match="batches must be a whole number of at least 1"):
        heldout_batches(corpus, batch_size=1, context=1, batches=0)


# Batches


def test_windows_overlap_by_one_token():
    batches = train_batches(counting_corpus(), batch_size=7, context=10, seed=3)
    assert isinstance(batches, grain.DatasetIterator)
    for batch in itertools.islice(batches, 30):
        assert batch.dtype == np.int32
        assert batch.shape == (7, 11)
        np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)
        assert (batch[:, 0] % 10 == 0).all()


def test_every_window_once_an_epoch_and_reshuffled():
    # 99 windows; 11 batches of 9 are an epoch.
    starts = take(train_batches(counting_corpus(), batch_size=9, context=10, seed=0), 33)[:, :, 0]
    epochs = starts.reshape(3, 99)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(99) * 10)
    for one, other in itertools.combinations([*epochs, np.arange(99) * 10], 2):
        assert (one == other).mean() < 0.1


def test_last_token_and_exact_fit():
    # 101 tokens hold 10 windows of 10 + 1, 100 tokens hold 9.
    for tokens, windows in [(101, 10), (100, 9), (11, 1)]:
        batches = train_batches(counting_corpus(tokens), batch_size=windows, context=10, seed=0)
        batch = next(batches)
        assert sorted(batch[:, 0]) == [10 * i for i in range(windows)]
        assert batch.max() == 10 * windows


def test_epoch_ends_within_a_batch():
    starts = take(train_batches(counting_corpus(), batch_size=10, context=10, seed=0), 99)[:, :, 0]
    for epoch in starts.reshape(10, 99):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(99) * 10)


def test_seeds_differ_and_repeat():
    def order(seed, batches=22):
        made = train_batches(counting_corpus(), batch_size=9, context=10, seed=seed)
        return take(made, batches)[:, :, 0].reshape(-1)

    np.testing.assert_array_equal(order(1), order(1))
    assert (order(0) == order(1)).mean() < 0.1
    # Grain shuffles epoch e with seed + e; neighbouring seeds must not share epochs all the same.
    assert (order(0)[99:] == order(1)[:99]).mean() < 0.1
    order(-1, 1)
    order(2**40, 1)


@pytest.mark.parametrize("count", [2, 3, 12])
def test_processes_share_the_global_batch_by_rows(count):
    corpus = counting_corpus()
    arguments = {"batch_size": 12, "context": 10, "seed": 5}
    alone = take(train_batches(corpus, **arguments), 20)
    parts = [
        take(train_batches(corpus, **arguments, shards=[i], shard_count=count), 20)
        for i in range(count)
    ]
    assert parts[0].shape == (20, 12 // count, 11)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)


def test_a_process_may_hold_any_of_the_shards():
    corpus = counting_corpus()
    arguments = {"batch_size": 12, "context": 10}
    some = {"shards": (0, 3), "shard_count": 4}
    rows = [0, 1, 2, 9, 10, 11]
    alone = take(train_batches(corpus, seed=5, **arguments), 20)
    part = take(train_batches(corpus, seed=5, **arguments, **some), 20)
    np.testing.assert_array_equal(part, alone[:, rows])
    heldout = heldout_batches(corpus, batches=1, **arguments)
    np.testing.assert_array_equal(
        heldout_batches(corpus, batches=1, **arguments, **some), heldout[:, rows]
    )


@pytest.mark.parametrize("taken", [0, 1, 10, 11, 25])
def test_restored_state_continues_bitwise(taken):
    def fresh():
        return train_batches(counting_corpus(), batch_size=9, context=10, seed=2)

    batches = fresh()
    for _ in range(taken):
        next(batches)
    saved = json.dumps(batches.get_state())
    expected = take(batches, 30)
    again = fresh()
    again.set_state(json.loads(saved))
    assert take(again, 30).tobytes() == expected.tobytes()
    # An iterator that has moved on can be set back, too.
    batches.set_state(json.loads(saved))
    assert take(batches, 30).tobytes() == expected.tobytes()


def test_state_is_the_step_on_any_number_of_processes():
    corpus = counting_corpus()
    arguments = {"batch_size": 12, "context": 10, "seed": 5}
    alone = train_batches(corpus, **arguments)
    take(alone, 13)
    state = alone.get_state()
    assert state == {"next_index": 13}
    expected = next(alone)
    parts = [train_batches(corpus, **arguments, shards=[i], shard_count=2) for i in range(2)]
    for part in parts:
        part.set_state(state)
    np.testing.assert_array_equal(np.concatenate([next(part) for part in parts]), expected)


def test_read_threads_change_nothing():
    def made(threads):
        return train_batches(
            counting_corpus(), batch_size=4, context=10, seed=0, read_threads=threads
        )

    plain, threaded = made(0), made(2)
    np.testing.assert_array_equal(take(plain, 40), take(threaded, 40))
    assert plain.get_state() == threaded.get_state()
    plain.set_state(threaded.get_state())
    np.testing.assert_array_equal(next(plain), next(threaded))
    threaded.close()


def test_iterator_is_saved_next_to_the_parameters(tmp_path):
    def fresh():
        return train_batches(counting_corpus(), batch_size=9, context=10, seed=2)

    state = {"params": jnp.arange(4.0), "step": jnp.int32(7)}
    batches = fresh()
    take(batches, 7)
    ocp.save_checkpointables(tmp_path / "both", {"state": state, "data": batches})
    metadata = {"data": batches.get_state()}
    ocp.save(tmp_path / "one", state, custom_metadata=metadata)
    expected = take(batches, 20)

    abstract = jax.tree.map(ocp.arrays.to_shape_dtype_struct, state)
    by_orbax = fresh()
    restored = ocp.load_checkpointables(tmp_path / "both", {"state": abstract, "data": by_orbax})
    assert restored["data"] is by_orbax
    np.testing.assert_array_equal(restored["state"]["params"], state["params"])
    assert take(by_orbax, 20).tobytes() == expected.tobytes()

    by_number = fresh()
    by_number.set_state(ocp.metadata(tmp_path / "one").custom_metadata["data"])
    np.testing.assert_array_equal(ocp.load(tmp_path / "one", abstract)["params"], state["params"])
    assert take(by_number, 20).tobytes() == expected.tobytes()


def test_end_to_end_on_text(library):
    batches = train_batches(library, batch_size=4, context=128, seed=0)
    batch = next(batches)
    text = library.train.tobytes()
    for row in batch:
        place = text.index(row.astype(np.uint8).tobytes())
        assert text[place : place + 129] == bytes(row.tolist())


# Held out


def test_heldout_batches_are_spread_and_fixed():
    corpus = counting_corpus(1000, 2001)  # 200 windows of 10
    batches = heldout_batches(corpus, batch_size=5, context=10, batches=8)
    assert batches.shape == (8, 5, 11)
    assert batches.dtype == np.int32
    np.testing.assert_array_equal(batches[:, :, 0].reshape(-1), 1000 + 50 * np.arange(40))
    np.testing.assert_array_equal(batches[..., 1:], batches[..., :-1] + 1)
    again = heldout_batches(corpus, batch_size=5, context=10, batches=8)
    assert batches.tobytes() == again.tobytes()


def test_heldout_batches_are_fewer_where_there_are_fewer():
    corpus = counting_corpus(1000, 231)  # 23 windows
    batches = heldout_batches(corpus, batch_size=5, context=10, batches=100)
    assert batches.shape == (4, 5, 11)
    assert len(np.unique(batches[:, :, 0])) == 20


@pytest.mark.parametrize("files", [1, 200])
def test_train_and_heldout_are_disjoint(tmp_path, files):
    for i in range(files):  # every line is there once
        lines = (f"{i:04} {j:06}\n" for j in range(8000 // files + 50))
        (tmp_path / f"{i:03}.txt").write_text("".join(lines))
    corpus = load_corpus([tmp_path])
    train = set(corpus.train.tobytes().split(b"\n"))
    heldout = set(corpus.heldout.tobytes().split(b"\n"))
    # A cut in the middle of a line leaves a piece of it on either side.
    assert {line for line in train & heldout if len(line) == 11} == set()
    assert len(heldout) > 50


@pytest.mark.parametrize("module", [corpus_module, data_module])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
