"""How much rounding changes the losses of a run, or anything that is computed."""

import jax
import numpy as np
import pytest
from ravine.training import train as loop
from ravine.training.placed import Placed

from .tolerances import UNIT, furthest


def furthest_loss(found, expected):
    """The largest difference of a loss between the records of two runs, relative to it."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    losses = [
        [record.get("loss", record.get("heldout_loss")) for record in run]
        for run in (found, expected)
    ]
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


def furthest_record(found, expected):
    """The largest difference of any number in the records of two runs, relative to it.

    Only what `expected` records is compared.
    """
    return np.max(
        [
            abs(record[name] - x) / (abs(x) or 1)
            for record, other in zip(found, expected, strict=True)
            for name, x in other.items()
        ]
    )


class Permuted:
    """Batches with the same rows in another order: the same gradients, but for rounding."""

    def __init__(self, batches, seed):
        self.batches, self.rng = batches, np.random.default_rng(seed)

    def __next__(self):
        batch = next(self.batches)
        return batch[self.rng.permutation(len(batch))]

    def __getattr__(self, name):
        return getattr(self.batches, name)


def moved(params, rng):
    """Each parameter moved by at most one unit in its last place."""

    def one(x):
        factors = 1 + 2 * UNIT * rng.integers(-1, 2, x.shape).astype(np.float32)
        found = np.asarray(x) * factors.astype(x.dtype)
        # What is committed to a device that `x` is not would be another program's argument.
        return jax.device_put(found, x.sharding if x.committed else None)

    return jax.tree.map(one, params)


def starting_moved(init, seed):
    """`Placed.init` with moved parameters."""

    def start(*args):
        state = init(*args)
        return state._replace(params=moved(state.params, np.random.default_rng(seed)))

    return start


def rounding_of(function, tree):
    """A bound on what rounding may do to `function(tree)`, relative to the largest element of a leaf.

    Eight times what moving each number of the tree by one unit in its last place does, and at least 16
    units, as in `rounding`.
    """
    expected = function(tree)
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    near = [furthest(function(moved(tree, rng)), expected) for rng in rngs]
    return max(8 * max(near), 16 * UNIT)


def rounding(run, expected, measure=furthest_loss):
    """A bound on what rounding may do to the losses of `run()`, relative to them.

    Later steps magnify it, up to chaos. How far is seen in runs that differ only in the last place of
    their first parameters and in the order of the rows of their batches. The bound is eight times the
    furthest of three, since on a mesh all sums of all steps have another order; and at least 16 units,
    as of a mean of 64 float32 losses. With `furthest_record` it is on all numbers of the records.
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
