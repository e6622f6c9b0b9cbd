"""Text as byte-pair tokens: nothing is lost, and losses can be compared with those over bytes."""

import json
import math
import sys

import numpy as np
import pytest
import tokenizers
from ravine.training.config import RunConfig
from ravine.training.data.bpe import corpus_of
from ravine.training.data.corpus import load_corpus
from ravine.training.samples import text_of

from .short_race import race, records


@pytest.fixture
def asked(text):
    return lambda **options: RunConfig(data=(text,), **options)


def test_the_text_comes_back_and_its_ratio_is_counted(asked, text):
    bytes_of, corpus = load_corpus((text,)), corpus_of(asked(bpe=300))
    assert corpus.vocabulary == 320
    assert corpus.train.dtype == np.uint16
    for part, plain in ((corpus.train, bytes_of.train), (corpus.heldout, bytes_of.heldout)):
        assert corpus.decode(part) == plain.tobytes().decode()
    assert corpus.bytes_per_token == len(bytes_of.heldout) / len(corpus.heldout)
    assert corpus.bytes_per_token > 1.5
    assert f"{corpus.bytes_per_token:.2f} bytes per token" in corpus.description
    assert text_of(corpus.train[:3], corpus) == repr(corpus.decode(corpus.train[:3]))
    # The same merges give the same text, other merges another one.
    again, other = corpus_of(asked(bpe=300)), corpus_of(asked(bpe=290))
    np.testing.assert_array_equal(again.train, corpus.train)
    assert again.fingerprint == corpus.fingerprint
    assert len({bytes_of.fingerprint, corpus.fingerprint, other.fingerprint}) == 3


def test_a_file_of_merges_is_read(asked, tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"line": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words.json does not give this text back"):
        corpus_of(asked(tokenizer=tmp_path / "words.json"))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match=r"none.json is no tokenizer"):
        corpus_of(asked(tokenizer=tmp_path / "none.json"))
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["line after line"], vocab_size=260, show_progress=False)
    made.save(str(tmp_path / "bpe.json"))
    corpus = corpus_of(asked(tokenizer=tmp_path / "bpe.json"))
    assert corpus.vocabulary == 320
    assert "bpe.json" in corpus.description
    # Token numbers with gaps are larger than their count.
    merges = json.loads((tmp_path / "bpe.json").read_text())
    merges["model"]["vocab"]["Ġ"] = 1000
    (tmp_path / "bpe.json").write_text(json.dumps(merges))
    corpus = corpus_of(asked(tokenizer=tmp_path / "bpe.json"))
    assert corpus.train.max() == 1000
    assert corpus.vocabulary == 1024


def test_every_held_out_piece_is_checked_for_loss(tmp_path):
    """Lower case loses nothing in the training text or in the first piece of the held-out text."""
    made = tokenizers.ByteLevelBPETokenizer(lowercase=True)
    made.train_from_iterator(["line after line"], vocab_size=260, show_progress=False)
    made.save(str(tmp_path / "lower.json"))
    (tmp_path / "text.txt").write_text("line after line\n" * 50_000 + "A last Line.\n")
    with pytest.raises(ValueError, match=r"lower.json does not give this text back"):
        corpus_of(RunConfig(data=(tmp_path / "text.txt",), tokenizer=tmp_path / "lower.json"))


def test_a_declared_ratio_makes_bits_per_byte_of_a_bin(tmp_path):
    file = tmp_path / "tokens.bin"
    np.arange(4000, dtype="<u2").tofile(file)
    assert corpus_of(RunConfig(data=(file,))).bytes_per_token is None
    assert corpus_of(RunConfig(data=(file,), bytes_per_token=4.25)).bytes_per_token == 4.25


def test_a_race_reports_both_units(asked, text, tmp_path, untimed):
    out = tmp_path / "race"
    assert race("--optimizers", "sgd", "--bpe", "300", "--samples", "1", text=text, out=out) == 0
    (*_, last) = [r for r in records(out / "sgd") if "heldout_loss" in r]
    ratio = corpus_of(asked(bpe=300)).bytes_per_token
    expected = last["heldout_loss"] / math.log(2) / ratio
    assert last["heldout_bits_per_byte"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bpe", "256"], "bpe must be above 256"),
        (["--bpe", "300", "--tokenizer", "x.json"], "give one of them"),
        (["--bpe", "300", "--vocabulary", "512"], "leave --vocabulary out"),
        (["--bytes-per-token", "4"], "bytes_per_token is known for text"),
        (["--bytes-per-token", "nan"], "bytes_per_token must be finite"),
    ],
)
def test_impossible_options_are_refused(words, expected, text, tmp_path, capsys):
    assert race(*words, text=text, out=tmp_path / "race") == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "race").exists()


def test_without_the_package_it_says_what_to_install(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "tokenizers", None
    )  # Python's own marker for a module that cannot be imported
    assert race("--bpe", "300", text=text, out=tmp_path / "race") == 2
    assert "pip install 'ravine[bpe]'" in capsys.readouterr().err
