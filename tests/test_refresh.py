"""When roots are refreshed: the schedule, its phases, and that only due roots are refreshed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from hypothesis import given, settings
from hypothesis import strategies as st
from ravine.optimizers.matrix.batch.phases import phases_of, refreshed
from ravine.optimizers.matrix.batch.refresh import Refresh
from ravine.optimizers.matrix.batch.together import Unit
from ravine.optimizers.matrix.mesh.placement import Spread


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.sampled_from([1.0, 8.0, 27.0, 512.0]), max_size=30),
    phases=st.integers(1, 12),
)
def test_units_are_dealt_evenly(costs, phases):
    """No phase has more work than another by more than the most expensive unit."""
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
    """Every phase is due once before the start, and once per period from then on."""
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
def test_refreshed_updates_every_matrix_once_per_period(staggered, max_elements):
    """The units have two kinds and sizes; those that are not due do not change."""
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


@pytest.mark.parametrize("staggered", [False, True])
def test_layers_of_a_scanned_model_take_turns(staggered):
    """12 layers and unlayered leaves: each once per period, and the same number at every step."""
    schedule = Refresh(7, staggered=staggered)
    sources = [jnp.broadcast_to(jnp.arange(24.0).reshape(12, 2, 1), (12, 2, 3)), jnp.ones((2, 3))]

    @jax.jit
    def step(count, carries):
        units = [
            Unit("a", sources[0], carries[0], spread=Spread(batch_axes=2, layers=12)),
            Unit("a", sources[1], carries[1]),
        ]
        add = lambda kind, carry, source: (carry[0] + 1, carry[1] + source[:, 0])
        return refreshed(units, add, schedule.phases, lambda phase: schedule.due(count, phase))

    carries = [(jnp.zeros(shape, jnp.int32), jnp.zeros(shape)) for shape in ((12, 2), (2,))]
    done = [0]
    for count in range(1, 22):
        carries = step(jnp.int32(count), carries)
        done.append(int(sum(jnp.sum(times) for times, _ in carries)))
        if count % 7 == 0:
            assert all(np.all(times == count // 7) for times, _ in carries)
    assert max(np.diff(done)) == (4 if staggered else 26)
    np.testing.assert_array_equal(carries[0][1], 3 * np.arange(24.0).reshape(12, 2))


def test_a_scanned_model_has_flat_steps():
    """With SOAP and a period equal to the number of layers, one layer is rotated at every step."""
    rng = np.random.default_rng(0)
    spectrum = (1 + np.arange(6)) ** -1.0
    tx = ravine.scale_by_soap(
        refresh=Refresh(4, staggered=True), axes=lambda path: ravine.optimizers.roles.IN_OUT
    )
    gradients = [
        jnp.array(np.float32(rng.normal(size=(4, 6, 6)) * spectrum[:, None] * spectrum))
        for _ in range(9)
    ]
    state, step = tx.init(jnp.zeros((4, 6, 6))), jax.jit(tx.update)
    turned = []
    for gradient in gradients:
        before, (_, state) = state, step(gradient, state)
        pairs = zip(before.bases[0], state.bases[0], strict=True)
        turned.append([np.any(a.vectors != b.vectors, axis=(1, 2, 3, 4)) for a, b in pairs])
    assert np.all(turned[0])
    assert np.all(np.sum(turned[1:], axis=2) == 1)
    np.testing.assert_array_equal(np.sum(turned[1:5], axis=0), 1)
