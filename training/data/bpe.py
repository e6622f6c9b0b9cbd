"""Text in tokens of byte-pair encoding, by Hugging Face's `tokenizers`, which is an extra."""

import hashlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import RunConfig
from .buckets import named
from .corpus import Corpus, load_corpus

_PIECE = 1 << 16  # bytes of text that are encoded as one, up to the end of a line
_TRAINED_ON = 1 << 24  # bytes of training text, evenly spread, that merges are counted on


def corpus_of(asked: RunConfig, vocabulary: int | None = None) -> Corpus:
    """The corpus of a run, tokenized as it asks.

    Args:
      asked: its configuration.
      vocabulary: see `load_corpus`; none with a tokenizer, which has its own.

    Raises:
      ValueError: as `load_corpus`; for a tokenizer that cannot be used, beside a vocabulary, or where
        the data are tokens already; for a ratio that is declared where it is known.
    """
    tokenized = bool(asked.bpe or asked.tokenizer)
    if tokenized and vocabulary is not None:
        raise ValueError(
            f"a tokenizer has its own vocabulary, not {vocabulary}; leave --vocabulary out."
        )
    corpus = load_corpus(asked.data, vocabulary=vocabulary, heldout=asked.heldout_data)
    of_bytes = corpus.bytes_per_token is not None
    if tokenized and not of_bytes:
        raise ValueError(
            f"{named(asked.data[0])} holds tokens already; leave --bpe and --tokenizer out."
        )
    if asked.bytes_per_token:
        if of_bytes:
            raise ValueError(
                "bytes_per_token is known for text; declare it for a .bin only, whose tokenizer is not."
            )
        return replace(corpus, bytes_per_token=asked.bytes_per_token)
    return _encoded(corpus, asked) if tokenized else corpus


def _encoded(corpus: Corpus, asked: RunConfig) -> Corpus:
    # Else tokenizers warns when a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizers = _module()
    if asked.tokenizer is not None:
        tokenizer, name = _read(tokenizers, asked.tokenizer), asked.tokenizer.name
    else:
        tokenizer, name = _trained(tokenizers, corpus.train, asked.bpe), f"BPE of {asked.bpe}"
    size = max(tokenizer.get_vocab().values(), default=0) + 1  # there may be holes
    dtype = np.uint16 if size <= 1 << 16 else np.uint32
    train = _tokens(tokenizer, corpus.train, dtype)
    heldout = _tokens(tokenizer, corpus.heldout, dtype, lossless=name)
    digest = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.to_str()}".encode())
    ratio = len(corpus.heldout) / max(len(heldout), 1)
    return replace(
        corpus,
        train=train,
        heldout=heldout,
        vocabulary=-(-size // 64) * 64,
        bytes_per_token=ratio,
        description=f"{corpus.description}, {name} ({ratio:.2f} bytes per token)",
        fingerprint=digest.hexdigest()[:16],
        decode=lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=False),
    )


def _read(tokenizers: Any, file: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(
            f"{file} is no tokenizer ({error}); give --tokenizer a tokenizer.json of Hugging Face's."
        ) from None


def _trained(tokenizers: Any, text: np.ndarray, size: int) -> Any:
    """Merges as GPT-2 makes them: of bytes, inside of words, no token special."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    pieces = list(_pieces(text))
    every = max(1, len(text) // _TRAINED_ON)
    tokenizer.train_from_iterator(pieces[::every], trainer)
    return tokenizer


def _tokens(tokenizer: Any, text: np.ndarray, dtype: Any, lossless: str = "") -> np.ndarray:
    """The text in tokens, refused where the tokenizer named in `lossless` loses some of it."""
    pieces = list(_pieces(text))
    found = [x.ids for x in tokenizer.encode_batch(pieces, add_special_tokens=False)]
    if lossless and tokenizer.decode_batch(found, skip_special_tokens=False) != pieces:
        raise ValueError(
            f"{lossless} does not give this text back, so bits per byte would mean nothing; take a "
            "byte-level tokenizer, or --bpe."
        )
    return np.concatenate([np.asarray(ids, dtype) for ids in found])


def _pieces(text: np.ndarray) -> Iterator[str]:
    """The text in pieces that end with a line."""
    content, start = text.tobytes(), 0
    while start < len(content):
        end = content.find(b"\n", start + _PIECE) + 1 or len(content)
        yield content[start:end].decode(errors="replace")
        start = end


def _module() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(
            "--bpe and --tokenizer need tokenizers; pip install 'ravine[bpe]', or leave them out."
        ) from None
