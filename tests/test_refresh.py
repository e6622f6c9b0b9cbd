"""When roots are refreshed: the schedule, its phases, and what is due alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ravine.optimizers.matrix.batch.refresh import Refresh, phases_of, refreshed
from ravine.optimizers.matrix.batch.together import Unit


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.sampled_from([1.0, 8.0, 27.0, 512.0]), max_size=30),
    phases=st.integers(1, 12),
)
def test_units_are_dealt_evenly(costs, phases):
    """No phase has more than another by more than the costliest unit."""
    found = phases_of(costs, phases)
    assert len(found) == len(costs)
    loads = [0.0] * phases
    for phase, cost in zip(found, costs, strict=True):
        loads[phase] += cost
    assert max(loads) - min(loads) <= max(costs, default=0.0)


def due_steps(schedule, phase, until=40):
    return [step for step in range(1, until) if schedule.due(jnp.int32(step), phase)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Refresh(5), [5, 10, 15, 20, 25, 30, 35]),
        (Refresh(5, 7), [7, 10, 15, 20, 25, 30, 35]),
        (Refresh(5, 10), [10, 15, 20, 25, 30, 35]),
        (Refresh(1), list(range(1, 40))),
        (Refresh(1, 30, staggered=True), list(range(30, 40))),
        (Refresh(10, math.inf), []),
        (Refresh(10, math.inf, staggered=True), []),
    ],
    ids=str,
)
def test_due_steps(schedule, expected):
    assert due_steps(schedule, 0) == expected


@pytest.mark.parametrize("start", [None, 7, 11])
@pytest.mark.parametrize("every", [2, 5, 7])
def test_staggered_phases_take_turns(every, start):
    """All phases once before the start and once a period from then on."""
    schedule = Refresh(every, start, staggered=True)
    phases = [due_steps(schedule, phase) for phase in range(schedule.phases)]
    assert schedule.phases == every
    assert sorted(step for steps in phases for step in steps) == list(
        range(int(schedule.first) - every + 1, 40)
    )
    for steps in phases:
        assert steps[0] <= schedule.first
        assert set(np.diff(steps).tolist()) == {every}


@pytest.mark.parametrize("first", [5, 7])
def test_start_of_the_schedule(first):
    schedule = Refresh(5, first)
    started = [bool(schedule.started(jnp.int32(step))) for step in range(1, 12)]
    assert started == [step >= first for step in range(1, 12)]
    assert not Refresh(5, math.inf).started(jnp.int32(2**31 - 1))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "10"])
def test_bad_period(every):
    with pytest.raises(ValueError, match="every must be a whole number"):
        Refresh(every)


@pytest.mark.parametrize("start", [0, 4, 7.5, -math.inf, math.nan])
def test_bad_start(start):
    with pytest.raises(ValueError, match="start must be a step from 5"):
        Refresh(5, start)


@pytest.mark.parametrize("max_elements", [None, 9])
@pytest.mark.parametrize("staggered", [False, True])
def test_refreshed_updates_every_matrix_once_a_period(staggered, max_elements):
    """Of units of two kinds and sizes; what is not due stays as it is."""
    schedule = Refresh(3, staggered=staggered)
    counts, each = (2, 3, 1, 7), (1, 2, 3, 4)
    sizes, kinds = (3, 3, 5, 3), ("a", "b", "a", "b")
    sources = [
        value * jnp.ones((count, size, size))
        for count, value, size in zip(counts, each, sizes, strict=True)
    ]

    @functools.partial(jax.jit)
    def step(count, carries):
        units = [Unit(*unit) for unit in zip(kinds, sources, carries, strict=True)]

        def function(kind, carry, source):
            times, seen = carry
            return times + 1, seen + source[:, 0, 0] + (10 if kind == "b" else 0)

        due = lambda phase: schedule.due(count, phase)
        return refreshed(units, function, schedule.phases, due, max_elements)

    carries = [(jnp.zeros(len(s), jnp.int32), jnp.zeros(len(s))) for s in sources]
    for count in range(1, 10):
        carries = step(jnp.int32(count), carries)
        done = [times for times, _ in carries]
        if count % 3 == 0:
            assert all(np.all(times == count // 3) for times in done)
        elif staggered:
            before = count // 3
            assert {int(n) - before for times in done for n in times} == {0, 1}
    for (_, seen), each in zip(carries, (1, 12, 3, 14), strict=True):
        np.testing.assert_array_equal(seen, np.full(seen.shape, 3 * each))
