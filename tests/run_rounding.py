"""How much rounding changes the losses of a run, or any other computed values."""

import jax
import numpy as np
import pytest
from ravine.training import train as loop
from ravine.training.placed import Placed

from .tolerances import UNIT, furthest


def furthest_loss(found, expected):
    """The largest relative difference between the losses in the records of two runs."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    losses = [
        [record.get("loss", record.get("heldout_loss")) for record in run]
        for run in (found, expected)
    ]
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


def furthest_record(found, expected):
    """The largest relative difference between any numbers in the records of two runs.

    Compares only the fields that `expected` contains.
    """
    return np.max(
        [
            abs(record[name] - x) / (abs(x) or 1)
            for record, other in zip(found, expected, strict=True)
            for name, x in other.items()
        ]
    )


class Permuted:
    """Batches with their rows in another order: the gradients are the same except for rounding."""

    def __init__(self, batches, seed):
        self.batches, self.rng = batches, np.random.default_rng(seed)

    def __next__(self):
        batch = next(self.batches)
        return batch[self.rng.permutation(len(batch))]

    def __getattr__(self, name):
        return getattr(self.batches, name)


def moved(params, rng):
    """Moves each parameter by at most one unit in the last place."""

    def one(x):
        factors = 1 + 2 * UNIT * rng.integers(-1, 2, x.shape).astype(np.float32)
        found = np.asarray(x) * factors.astype(x.dtype)
        # An array committed to a device where `x` is not committed would need another program.
        return jax.device_put(found, x.sharding if x.committed else None)

    return jax.tree.map(one, params)


def starting_moved(init, seed):
    """`Placed.init` with the parameters moved in their last place."""

    def start(*args):
        state = init(*args)
        return state._replace(params=moved(state.params, np.random.default_rng(seed)))

    return start


def rounding_of(function, tree):
    """A bound on the rounding error of `function(tree)`, relative to the largest element of each leaf.

    Eight times the change from moving every number in the tree by one unit in its last place, and at
    least 16 units, as in `rounding`.
    """
    expected = function(tree)
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    near = [furthest(function(moved(tree, rng)), expected) for rng in rngs]
    return max(8 * max(near), 16 * UNIT)


def rounding(run, expected, measure=furthest_loss):
    """A bound on the relative rounding error in the losses of `run()`.

    Later steps magnify rounding, in the worst case chaotically. To measure how far, we compare runs that
    differ only in the last place of their initial parameters and in the row order of their batches. The
    bound is eight times the largest difference among three such runs, since a mesh changes the order of
    every sum in every step, and at least 16 units, as for a mean of 64 float32 losses. With
    `furthest_record`, the bound covers all numbers in the records.
    """
    worst, batches, init = 0.0, loop.train_batches, Placed.init
    for seed in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loop, "train_batches", lambda *a, _seed=seed, **k: Permuted(batches(*a, **k), _seed)
            )
            patch.setattr(Placed, "init", starting_moved(init, seed))
            worst = max(worst, measure(run(), expected))
    return max(8 * worst, 16 * UNIT)
