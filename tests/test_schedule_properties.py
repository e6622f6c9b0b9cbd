"""Properties that hold for all lengths, with examples drawn by hypothesis."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ravine import schedules as s

from .schedules_table import SCHEDULE
from .tolerances import UNIT

FEW = settings(max_examples=15, deadline=None, derandomize=True)
lengths = st.integers(1, 300)
ratios = st.floats(0.01, 1.0)
shapes = st.sampled_from(
    ["linear", "1-sqrt", "cosine", "square", "mirror-cosine", "inverse", "exponential"]
)
EPS = 2 * UNIT


def values(schedule, steps):
    # The same shape for all, so operations are compiled only once.
    return np.asarray(schedule(jnp.arange(1024)), np.float64)[:steps]


@FEW
@given(shapes, lengths, ratios, st.floats(1e-4, 10.0))
def test_decays_fall_within_their_bounds_to_their_end(shape, steps, end_ratio, peak):
    v = values(s.decay(peak, steps, shape, end_ratio), steps + 2)
    slack = 2 * EPS * peak
    assert v.max() <= peak + slack
    assert v.min() >= peak * end_ratio - slack
    assert np.diff(v).max() <= slack
    ends = [peak, peak * end_ratio, peak * end_ratio]
    np.testing.assert_allclose(v[[0, -2, -1]], ends, rtol=4 * UNIT)


@FEW
@given(shapes, st.integers(2, 300), lengths, lengths)
def test_joins_are_continuous(shape, steps, duration, warm):
    """A jump at a join is no larger than the steps beside it."""
    body = s.anneal_from(s.cosine(1.0, 300), steps, duration, shape, 0.5)
    branch = values(body, 700)
    before = values(s.cosine(1.0, 300), 700)
    np.testing.assert_array_equal(branch[: steps + 1], before[: steps + 1])

    warmed = values(s.warmup(body, warm), 1000)
    assert abs(warmed[warm] - warmed[warm - 1]) <= EPS  # the ramp ends at the level
    np.testing.assert_array_equal(warmed[warm:], values(body, 1000 - warm))

    again = values(s.rewarm(body, steps, duration, s.linear(0.7, 100)), 1000)
    inner = again[steps : steps + duration + 1]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=SCHEDULE)
    close(inner[0], branch[steps])
    close(inner[-1], 0.7)
    close(np.diff(inner), (0.7 - inner[0]) / duration)


@FEW
@given(shapes, st.integers(1, 100), st.integers(1, 10))
def test_repeat_preserves_the_integral(shape, period, times):
    body = s.decay(1.0, period, shape, 0.1)
    again = values(s.repeat(body, period, times), period * times)
    one = values(body, period)
    np.testing.assert_array_equal(again, np.tile(one, times))
    np.testing.assert_allclose(again.sum(), times * one.sum(), rtol=2 * times * period * 2.0**-53)


@FEW
@given(lengths, st.integers(-100, 100))
def test_shift_only_moves(steps, by):
    body = values(s.linear(1.0, steps), 400)
    moved = values(s.shift(s.linear(1.0, steps), by), 300)
    expected = body[np.maximum(np.arange(300) - by, 0)]
    np.testing.assert_array_equal(moved, expected)


@FEW
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.lists(st.integers(1, 40), min_size=4, max_size=4),
)
def test_batch_sizes_count_every_example(sizes, gaps):
    bounds = tuple(int(b) for b in np.cumsum(gaps)[: len(sizes) - 1])
    batch = s.BatchSizes(tuple(sizes), bounds)
    each = np.asarray(batch(jnp.arange(1024)))
    seen = np.concatenate([[0], np.cumsum(each)])
    for count in (0, 1, *bounds, *(b - 1 for b in bounds), 200):
        assert batch.data_offset(count) == seen[count]
        assert batch.at(count) == each[count]
        found = [size for size, updates in batch.phases(count) for _ in range(updates)]
        np.testing.assert_array_equal(found, each[:count])
        assert batch.count_at(int(seen[count])) == count
        assert batch.count_at(int(seen[count]) + 1) == count + 1
    for size in (batch.tick, 7):
        whole, rest, per_batch = batch.batches_at(jnp.arange(1024), size)
        parts = np.asarray(whole) * per_batch + np.asarray(rest)
        np.testing.assert_array_equal(parts * size, seen[:-1] * per_batch)


@FEW
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_merge_weights_and_decay_are_each_others_inverse(decay):
    decay = sorted(decay, reverse=True)
    weights = s.merge_weights(decay)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), 1.0)
    # A difference and a sum for each of at most 31 weights, in float64.
    np.testing.assert_allclose(s.decay_of_merge(weights), decay, rtol=0, atol=62 * 2.0**-53)


@pytest.mark.parametrize("factor", [1, 1.5, 2, 3])
@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_restarts_by_default_fill_the_run(factor, stride):
    """Every run ends at the floor, and periods grow by the factor, up to rounding."""
    for steps in range(3, 2001):
        schedule = s.sgdr(1.0, steps, 0.1, period_factor=factor)
        periods = np.diff(schedule.boundaries)
        assert schedule.boundaries[0] == 0
        assert schedule.boundaries[-1] == steps
        assert len(periods) == 3 or steps < 2 * (1 + factor + factor**2)
        assert min(periods) >= 1
        for before, after in itertools.pairwise(periods):
            assert abs(after - factor * before) <= 1 + factor
        if (steps - 3) % stride == 0:
            v = np.asarray(schedule(jnp.asarray([0, steps - 1, steps, steps + 7])), np.float64)
            np.testing.assert_allclose(v[[0, 2, 3]], [1.0, 0.1, 0.1], rtol=0, atol=SCHEDULE)
            last = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (1 - 1 / periods[-1])))
            assert v[1] <= last + SCHEDULE
