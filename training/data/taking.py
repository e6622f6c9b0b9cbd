"""What the trainer takes its batches from: of one size, read by Grain, or of sizes that change.

Both say where they are in the data, so that a run goes on from there whichever of them it had before.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np

Rows = Callable[[Sequence[int]], np.ndarray]


class Batches(Protocol):
    """Batches in order, and the position among them as JSON values."""

    def take(self, size: int) -> np.ndarray:
        """The next so many rows of all processes; this one's are returned."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


class OfOneSize:
    """Batches that an iterator reads, ahead if it was told to.

    Args:
      iterator: of `train_batches`.
      size: that of its batches.
    """

    def __init__(self, iterator: grain.DatasetIterator, size: int):
        self._iterator, self._size = iterator, size

    def take(self, size: int) -> np.ndarray:
        """The next batch, which has this size."""
        assert size == self._size
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """As Grain has it: batches taken."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position; one counted in examples must lie between two batches."""
        if "next_example" in state:
            index, rest = divmod(state["next_example"], self._size)
            if rest:
                raise ValueError(
                    f"{state['next_example']} examples were read, which batches of {self._size} never "
                    "do; keep the batch schedule."
                )
            state = {"next_index": index}
        self._iterator.set_state(state)


class OfManySizes:
    """Batches of any size, cut from one endless order of examples.

    Args:
      rows: of `train_rows`.
      size: that of the batches in which a position of Grain's is counted.
      shards: which of the shards of every batch are this process's, in ascending order.
      shard_count: how many there are.
    """

    def __init__(self, rows: Rows, size: int, shards: Sequence[int], shard_count: int):
        self._rows, self._size = rows, size
        self._shards, self._shard_count = shards, shard_count
        self._next = 0

    def take(self, size: int) -> np.ndarray:
        """The next batch of this size."""
        part = size // self._shard_count
        starts = [self._next + shard * part for shard in self._shards]
        self._next += size
        return self._rows([at for start in starts for at in range(start, start + part)])

    def get_state(self) -> dict[str, Any]:
        """Examples taken."""
        return {"next_example": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        if "next_example" in state:
            self._next = state["next_example"]
        else:
            self._next = state["next_index"] * self._size
