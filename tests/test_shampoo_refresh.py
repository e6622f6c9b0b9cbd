"""Which of Shampoo's roots are refreshed at which step, all at once or staggered."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import ravine

from .preconditioned import conditioned, normal, refreshed_roots, run
from .tolerances import HALF, furthest


@pytest.mark.parametrize(("every", "start"), [(4, 4), (4, 10), (3, 7)])
def test_staggered_refresh_visits_every_root_once_per_period(every, start):
    gradients = [{"a": normal((8, 8), s), "b": normal((5, 3), 50 + s)} for s in range(20)]
    refresh = ravine.Refresh(every=every, start=start, staggered=True)
    tx = ravine.scale_by_shampoo(refresh=refresh, blocks=ravine.Blocks(size=4))
    first = tx.init(gradients[0])
    updates, states = run(tx, gradients)
    changed = [refreshed_roots(a, b) for a, b in zip([first, *states[:-1]], states, strict=True)]
    assert len(changed[0]) == 8 + 4
    begin = start - every
    assert not np.any(changed[:begin])
    for at in range(begin, 20 - every + 1):
        np.testing.assert_array_equal(np.sum(changed[at : at + every], axis=0), 1)
    assert all(1 <= flags.sum() <= 12 / every + 1 for flags in changed[begin:])
    plain, _ = run(
        ravine.scale_by_shampoo(
            refresh=ravine.Refresh(every=every, start=math.inf), blocks=ravine.Blocks(size=4)
        ),
        gradients,
    )
    for at in range(start - 1):
        np.testing.assert_array_equal(updates[at]["a"], plain[at]["a"])
    assert jnp.any(updates[start - 1]["a"] != plain[start - 1]["a"])


def test_synchronous_refresh_visits_all_at_once():
    gradients = normal((8, 8), count=12)
    tx = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=4, start=6), blocks=ravine.Blocks(size=4)
    )
    _, states = run(tx, gradients)
    changed = [refreshed_roots(a, b) for a, b in itertools.pairwise(states)]
    assert [int(flags.sum()) for flags in changed] == [0, 0, 0, 0, 8, 0, 8, 0, 0, 0, 8]


@pytest.mark.usefixtures("float64")
def test_staggered_agrees_with_synchronous_on_a_constant_gradient():
    gradients = [{"a": conditioned(8, 0), "b": conditioned(4, 1)}] * 30
    found, expected = (
        run(
            ravine.scale_by_shampoo(
                refresh=ravine.Refresh(every=5, staggered=staggered), blocks=ravine.Blocks(size=4)
            ),
            gradients,
        )[0][-1]
        for staggered in (True, False)
    )
    assert furthest(found, expected) <= HALF
