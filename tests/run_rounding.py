"""What another order of the same sums does to the losses of a run."""

import numpy as np
import pytest
from ravine.training import train as loop

from .tolerances import UNIT


def furthest_loss(found, expected):
    """The largest difference of a loss between the records of two runs, relative to it."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    losses = [
        [record.get("loss", record.get("heldout_loss")) for record in run]
        for run in (found, expected)
    ]
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


class Permuted:
    """Batches with the same rows in another order: the same gradients, but for rounding."""

    def __init__(self, batches, seed):
        self.batches, self.rng = batches, np.random.default_rng(seed)

    def __next__(self):
        batch = next(self.batches)
        return batch[self.rng.permutation(len(batch))]

    def __getattr__(self, name):
        return getattr(self.batches, name)


def rounding(run, expected):
    """A bound on what the order of sums may do to the losses of `run()`, relative to them.

    Rounding is magnified by what follows, up to chaos; how far, runs tell that differ in nothing but the
    order of the rows of their batches. Eight times the furthest of three, as on a mesh all sums have
    another order, not only those over rows; and at least 16 units, as of a mean of 64 float32 losses.
    """
    worst, batches = 0.0, loop.train_batches
    for seed in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loop, "train_batches", lambda *a, order=seed, **k: Permuted(batches(*a, **k), order)
            )
            worst = max(worst, furthest_loss(run(), expected))
    return max(8 * worst, 16 * UNIT)
