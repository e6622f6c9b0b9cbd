"""Batches: bad input, order, processes and restorable positions."""

import doctest
import itertools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from ravine.training.data import batches as data_module
from ravine.training.data import corpus as corpus_module
from ravine.training.data.batches import Corpus, heldout_batches, load_corpus, train_batches


def counting_corpus(tokens: int = 1000, heldout: int = 200) -> Corpus:
    """Token i has the value i, so a batch shows its position in the corpus."""
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
    text = tmp_path / "000.txt"
    text.write_text("x" * 100)
    corpus = load_corpus([text])
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


def test_every_window_once_per_epoch_and_reshuffled():
    # There are 99 windows, and 11 batches of 9 make an epoch.
    starts = take(train_batches(counting_corpus(), batch_size=9, context=10, seed=0), 33)[:, :, 0]
    epochs = starts.reshape(3, 99)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(99) * 10)
    for one, other in itertools.combinations([*epochs, np.arange(99) * 10], 2):
        assert (one == other).mean() < 0.1


def test_last_token_and_exact_fit():
    # 101 tokens hold 10 windows of 10 + 1; 100 tokens hold 9.
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
    # Grain shuffles epoch e with seed + e; even so, neighbouring seeds must not share epochs.
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
    # An iterator that has advanced can also be set back.
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


@pytest.mark.parametrize("module", [corpus_module, data_module])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
