"""A corpus becomes batches: windows of tokens, shuffled, cut up by process, and resumable.

Window `i` covers tokens `i * context` to `i * context + context`, both included: `context` inputs
and the same moved on by one as targets. Neighbours share one token, so every token but the first is
a target exactly once an epoch, save a remainder too short for a window at the end.

Order and position are Grain's: a stateless shuffle turns the number of a step into its windows, so
the whole state of the iterator is that number. It can be saved as JSON, or handed to Orbax next to
the parameters::

    from orbax.checkpoint import v1 as ocp

    ocp.save_checkpointables(path, {"state": state, "data": iterator})
    restored = ocp.load_checkpointables(path, {"state": abstract_state, "data": iterator})

The second writes one file per process and requires as many processes again. The first is one number for
all of them: kept with the parameters, it lets a run continue on another number of processes.
"""

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np

from .corpus import Corpus, load_corpus
from .taking import Rows

__all__ = ["Corpus", "heldout_batches", "load_corpus", "train_batches", "train_rows"]


Order = Literal["shuffled", "stored"]


def train_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    seed: int,
    shards: Sequence[int] = (0,),
    shard_count: int = 1,
    read_threads: int = 0,
    order: Order = "shuffled",
) -> grain.DatasetIterator[np.ndarray]:
    """An endless iterator over batches of training windows, in a new order every epoch.

    Each step has a global batch that depends on `corpus`, `batch_size`, `context` and `seed` only.
    It is cut by rows into shards of equal size, and a process reads those that its devices hold; so
    `jax.make_array_from_process_local_data` puts batches together without moving any. An epoch may
    end within a batch.

    `get_state()` gives the position, a dict that JSON can hold (the steps taken); after
    `set_state()` the batches that follow are bitwise those that followed when it was taken.

    Args:
      corpus: what `load_corpus` returned.
      batch_size: rows of the global batch, a multiple of `shard_count`.
      context: inputs per row, in tokens.
      seed: any whole number; it decides the order and nothing else.
      shards: which of them, in ascending order; see `ravine.training.sharding.local_shards`.
      shard_count: how many shards there are.
      read_threads: threads that read ahead, two batches each. 0, the default, reads when asked,
        which costs less than starting threads as long as the tokens lie in memory; a few help where
        a `.bin` lies on a slow disk. The batches and the state are the same.
      order: ``"shuffled"``, or ``"stored"``: windows as they stand in the files, whatever the seed, and
        of each file only whole batches.

    Returns:
      A Grain iterator over int32 arrays, [rows, context + 1], the rows of all `shards`: inputs are
      `batch[:, :-1]`, targets `batch[:, 1:]`.

    Raises:
      ValueError: for arguments out of range, or a training part of less than context + 1 tokens.

    Example:
      >>> from ravine.training.data.batches import load_corpus, train_batches
      >>> batches = train_batches(load_corpus(), batch_size=4, context=64, seed=0)
      >>> next(batches).shape, batches.get_state()
      ((4, 65), {'next_index': 1})
    """
    _check_positive(batch_size=batch_size, context=context, shard_count=shard_count)
    _check_shards(batch_size, shards, shard_count)
    ordered = _ordered(corpus, context, seed, order, batch_size)
    blocks = ordered.batch(batch_size // shard_count, drop_remainder=True)

    def local(step: int) -> np.ndarray:
        corpus.check_unchanged()
        parts: Any = [blocks[step * shard_count + shard] for shard in shards]
        return np.concatenate(parts)

    steps = grain.MapDataset.range(len(blocks) // shard_count).map(local)
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    return iter(steps.to_iter_dataset(options))


def train_rows(
    corpus: Corpus, *, context: int, seed: int, order: Order = "shuffled", batch_size: int = 1
) -> Rows:
    """The examples that `train_batches` puts into batches: from their numbers to them, stacked."""
    _check_positive(context=context)
    ordered = _ordered(corpus, context, seed, order, batch_size)

    def rows(numbers: Sequence[int]) -> np.ndarray:
        corpus.check_unchanged()
        examples: Any = [ordered[number] for number in numbers]
        return np.stack(examples)

    return rows


def _ordered(
    corpus: Corpus, context: int, seed: int, order: Order, batch_size: int
) -> grain.MapDataset:
    """Windows without end, shuffled in a new order every epoch."""
    stored = order == "stored"
    windows = _Windows(
        corpus.shards, context, corpus.vocabulary, multiple=batch_size if stored else 1
    )
    if not len(windows):
        needed = (batch_size if stored else 1) * context + 1
        raise ValueError(_too_short(corpus, "training", sum(map(len, corpus.shards)), needed))
    source = grain.MapDataset.source(windows)
    return (source if stored else source.shuffle(seed=_spread(seed))).repeat()


def heldout_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    batches: int,
    shards: Sequence[int] = (0,),
    shard_count: int = 1,
) -> np.ndarray:
    """Windows of the held-out tokens, evenly spread over them: the same in every run.

    Of held-out tokens that were given as such, windows from the first on, in order.

    Args:
      corpus: what `load_corpus` returned.
      batch_size: rows of a batch.
      context: inputs per row, in tokens.
      batches: how many batches at most.
      shards: which shards of every batch, as in `train_batches`.
      shard_count: how many shards there are.

    Returns:
      int32, [n, rows, context + 1], no window twice; n is `batches`, or less where the held-out part
      has fewer windows.

    Raises:
      ValueError: for arguments below 1, or a held-out part too short for a single batch.

    Example:
      >>> from ravine.training.data.batches import heldout_batches, load_corpus
      >>> heldout_batches(load_corpus(), batch_size=4, context=64, batches=2).shape
      (2, 4, 65)
    """
    _check_positive(batch_size=batch_size, context=context, batches=batches)
    _check_shards(batch_size, shards, shard_count)
    windows = _Windows((corpus.heldout,), context, corpus.vocabulary)
    count = min(batches, len(windows) // batch_size)
    if not count:
        needed = batch_size * context + 1
        raise ValueError(_too_short(corpus, "held-out", len(corpus.heldout), needed))
    rows = count * batch_size
    corpus.check_unchanged()
    local = np.arange(rows).reshape(count, shard_count, -1)[:, list(shards)].reshape(count, -1)
    apart = rows if corpus.fixed else len(windows)
    picked = np.stack([windows[row * apart // rows] for row in local.ravel().tolist()])
    return picked.reshape(*local.shape, context + 1)


class _Windows:
    """Random access to the windows of arrays of tokens, as Grain reads its sources.

    Of each array a multiple of so many windows counts.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], context: int, vocabulary: int, multiple: int = 1
    ):
        self._shards, self._context, self._vocabulary = shards, context, vocabulary
        counts = [max(0, len(tokens) - 1) // context // multiple * multiple for tokens in shards]
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect.bisect_right(self._ends, index)
        start = (index - (self._ends[shard - 1] if shard else 0)) * self._context
        window = self._shards[shard][start : start + self._context + 1].astype(np.int32)
        if window.max() >= self._vocabulary:
            raise ValueError(
                f"token {window.max()} of the corpus is outside its vocabulary of "
                f"{self._vocabulary}; name the tokenizer's: load_corpus(paths, vocabulary=...)."
            )
        return window


def _spread(seed: int) -> int:
    """A 32-bit seed far from those of other seeds.

    Grain shuffles epoch e with seed + e: without this, seed 1 would repeat seed 0's second epoch.
    """
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _check_shards(batch_size: int, shards: Sequence[int], shard_count: int) -> None:
    if batch_size % shard_count:
        raise ValueError(
            f"batch_size {batch_size} cannot be cut into {shard_count} shards; make it a multiple of "
            f"{shard_count}."
        )
    if not shards or not all(0 <= shard < shard_count for shard in shards):
        raise ValueError(f"shards must lie in [0, {shard_count}), got {tuple(shards)}.")


def _too_short(corpus: Corpus, part: str, present: int, needed: int) -> str:
    return (
        f"{corpus.description}: the {part} part has {present:,} tokens and at least {needed:,} are "
        f"needed; give more text, or a smaller context or batch."
    )
