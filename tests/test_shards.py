"""Shards of tokens with a header: several, held-out ones, and batches in the stored order."""

import itertools

import numpy as np
import pytest
from ravine.training.config import RunConfig
from ravine.training.data.batches import heldout_batches, load_corpus, train_batches, train_rows
from ravine.training.data.bpe import corpus_of
from ravine.training.data.shards import tokens_of, write_shard


@pytest.fixture
def shards(tmp_path):
    """Two training shards, 0 to 99 and 200 to 269, and one held-out shard, 500 to 599."""
    spans = {"train_1.bin": (0, 100), "train_2.bin": (200, 270), "val.bin": (500, 600)}
    return [write_shard(tmp_path / name, np.arange(*span)) for name, span in spans.items()]


def test_a_shard_is_what_its_header_says(shards, tmp_path):
    raw = shards[0].read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 100]
    assert not header[3:].any()
    assert len(raw) == 1024 + 2 * 100
    np.testing.assert_array_equal(tokens_of(shards[0]), np.arange(100))
    assert not tokens_of(shards[0]).flags.writeable
    one = load_corpus([shards[0]])  # its last tenth is held out, as for any single .bin
    assert (len(one.train), len(one.heldout), one.fixed) == (90, 10, False)


def test_shards_are_joined_and_held_out_tokens_are_taken_from_the_first_on(shards):
    run = RunConfig(data=tuple(shards[:2]), heldout_data=(shards[2],))
    corpus = corpus_of(run)
    assert [len(tokens) for tokens in corpus.shards] == [100, 70]
    assert corpus.vocabulary == 640
    assert corpus.description == (
        "train_1.bin and 1 more: 2 files, 340 bytes, uint16 tokens, 100 given tokens held out"
    )
    assert corpus.for_races() is corpus.for_tuning() is corpus
    rows = heldout_batches(corpus, batch_size=2, context=8, batches=2).reshape(4, 9)
    np.testing.assert_array_equal(rows, 500 + 8 * np.arange(4)[:, None] + np.arange(9))
    others = load_corpus(shards), load_corpus(shards[:1], heldout=shards[1:])  # the same files
    assert len({corpus.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert others[0].description.endswith("last 10% of the last file held out")
    starts = list(
        itertools.islice(train_batches(corpus, batch_size=5, context=10, seed=0), 3)
    )  # an epoch: 9 windows of the first, 6 of the second
    assert sorted(np.stack(starts)[:, :, 0].ravel()) == [*range(0, 90, 10), *range(200, 260, 10)]


@pytest.mark.parametrize("seed", [0, 1])
def test_stored_order_has_whole_batches_of_each_shard(shards, seed):
    """Shards of 100 and 70 tokens hold two batches and one batch of 4 x 10; then it starts over."""
    corpus = load_corpus(shards[:2], heldout=shards[2:])
    options = {"context": 10, "seed": seed, "order": "stored"}
    batches = train_batches(corpus, batch_size=4, **options)
    found = [next(batches) for _ in range(4)]
    for batch, start in zip(found, (0, 40, 200, 0), strict=True):
        np.testing.assert_array_equal(
            batch, start + 10 * np.arange(4)[:, None] + np.arange(11)[None, :]
        )
    part = train_batches(corpus, batch_size=4, shards=[1], shard_count=2, **options)
    np.testing.assert_array_equal(next(part), found[0][2:])
    np.testing.assert_array_equal(train_rows(corpus, batch_size=4, **options)([8]), found[2][:1])
    with pytest.raises(ValueError, match="170 tokens and at least 201 are needed"):
        train_batches(corpus, batch_size=20, **options)


def _header(path, position, value):
    header = np.frombuffer(path.read_bytes()[:1024], "<i4").copy()
    header[position] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[1024:])
    return path


def test_bad_shards_are_refused(shards, tmp_path):
    one, two, held = shards
    text = tmp_path / "a.txt"
    text.write_text("text")
    for paths, given, message in [
        ([_header(one, 1, 2)], [], r"train_1\.bin: a shard of version 2; only 1 is known"),
        ([_header(two, 2, 71)], [], r"train_2\.bin: 70 tokens, and its header says 71; download"),
        ([write_shard(tmp_path / "none.bin", [])], [], r"none\.bin: the shard has no tokens"),
        ([held, held], [], r"val\.bin is given twice"),
        ([held], [held], r"val\.bin is given twice"),
        ([held], [text], r"a\.txt is no \.bin and stands beside one"),
        ([text], [held], r"heldout .*val\.bin needs data in \.bin files"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_corpus(paths, heldout=given)
