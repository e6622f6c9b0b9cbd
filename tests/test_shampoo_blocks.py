"""Shampoo treats blocks as separate parameters, and their padding has no effect."""

import jax.numpy as jnp
import numpy as np
import pytest
import ravine

from .preconditioned import factors, normal, run
from .tolerances import HALF, double, furthest


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("graft", ["none", "adam"])
def test_blocks_are_parameters_of_their_own(graft):
    gradients = double(normal((8, 12), count=5))
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=2),
        blocks=ravine.Blocks(size=4),
        graft=ravine.Grafting(step=graft),
    )

    def cut(x):
        return {
            f"{i}{j}": x[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for i in range(2) for j in range(3)
        }

    whole, states = run(tx, gradients)
    assert factors(states[-1])[0].statistics.shape == (1, 2, 3, 4, 4)
    apart, _ = run(tx, [cut(g) for g in gradients])
    assert furthest([cut(update) for update in whole], apart) <= HALF


@pytest.mark.usefixtures("float64")
def test_uneven_blocks_are_padded_without_trace():
    """For a 7 x 5 leaf in blocks of at most 4, padded rows and columns neither move nor cause harm."""
    gradients = double(normal((7, 5), count=5))
    updates, states = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), blocks=ravine.Blocks(size=4)),
        gradients,
    )
    padded = [jnp.pad(g, ((0, 1), (0, 1))) for g in gradients]
    wider, _ = run(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), blocks=ravine.Blocks(size=4)),
        padded,
    )
    assert all(not np.any(f.refused) for f in factors(states[-1]))
    assert furthest(updates, [update[:7, :5] for update in wider]) <= HALF
    assert not any(np.any(update[7:]) for update in wider)


@pytest.mark.usefixtures("float64")
def test_padding_is_not_an_eigenvalue():
    """Seven rows in blocks of four are two such blocks, in which one row is padding."""
    gradients = [double(normal((7, 8), seed)) for seed in range(6)]
    options = {
        "refresh": {"every": 2},
        "roots": {"ridge": 0.0},
        "b2": 1.0,
        "graft": {"step": "none"},
    }
    _, states = run(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), **options), gradients)
    rows, columns = factors(states[-1])
    assert not np.any(rows.refused)
    assert not np.any(columns.refused)
    assert jnp.max(rows.condition) < 1e3
    padded = rows.root[0, 1]
    assert not np.any(padded[:, 3])
    alone, _ = run(ravine.scale_by_shampoo(**options), [g[4:, :4] for g in gradients])
    whole, _ = run(ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), **options), gradients)
    assert furthest(whole[-1][4:, :4], alone[-1]) <= HALF
