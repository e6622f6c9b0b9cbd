"""Grafting: one transformation's direction with the step size of another."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .preconditioned import normal, run
from .tolerances import HALF, double, furthest


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "pointing",
    [
        optax.identity(),
        ravine.scale_by_muon(),
        ravine.scale_by_shampoo(
            refresh=ravine.Refresh(every=2), graft=ravine.Grafting(step="none")
        ),
    ],
    ids=["identity", "muon", "shampoo"],
)
def test_graft_takes_the_direction_of_one_and_the_norm_of_another(pointing):
    gradients = [{"a": normal((4, 6), s), "b": normal((5, 5), 9 + s)} for s in range(4)]
    gradients = double(gradients)
    found, states = run(ravine.graft(pointing, ravine.scale_by_adam()), gradients)
    directions, _ = run(pointing, gradients)
    sizes, _ = run(ravine.scale_by_adam(), gradients)
    assert states[-1].count == 4
    for update, p, d in zip(found, directions, sizes, strict=True):
        rescaled = lambda x, y: x * jnp.linalg.norm(y) / jnp.linalg.norm(x)
        assert furthest(update, jax.tree.map(rescaled, p, d)) <= HALF


@pytest.mark.parametrize("start", [1, 3, math.inf])
def test_start_of_graft(start):
    gradients = normal((4, 6), count=5)
    tx = ravine.graft(ravine.scale_by_muon(), ravine.scale_by_adam(), start=start)
    found, _ = run(tx, gradients)
    plain, _ = run(ravine.scale_by_adam(), gradients)
    for step, (a, b) in enumerate(zip(found, plain, strict=True), 1):
        assert np.array_equal(a, b) == (step < start)


def test_graft_of_zero_is_zero():
    gradients = [jnp.zeros((4, 4))] * 2
    updates, _ = run(ravine.graft(ravine.scale_by_muon(), ravine.scale_by_adam()), gradients)
    assert not np.any(jnp.stack(updates))


@pytest.mark.parametrize("start", [0, 0.5, -math.inf, math.nan])
def test_bad_start_of_graft(start):
    with pytest.raises(ValueError, match="start must be a step"):
        ravine.graft(optax.identity(), optax.identity(), start=start)
