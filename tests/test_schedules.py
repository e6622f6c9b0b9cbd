"""What all schedules have in common, in one table: bits, counts, ends, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine import schedules as s

from .schedules_table import PEAK, SCHEDULES, SHAPES, STEPS
from .tolerances import UNIT

COUNTS = jnp.arange(STEPS + 20)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@functools.cache
def built(name):
    return SCHEDULES[name].build()


@functools.cache
def values(name):
    return np.asarray(built(name)(COUNTS))


@every_schedule
def test_one_count_and_many_jitted_or_not_agree_bit_for_bit(name):
    """New counts do not cause another compilation either."""
    schedule, expected = built(name), values(name)
    traced = []
    jitted = jax.jit(lambda count: traced.append(count) or schedule(count))
    np.testing.assert_array_equal(np.asarray(jitted(COUNTS)), expected)
    np.testing.assert_array_equal([np.asarray(jitted(c)) for c in COUNTS[::17]], expected[::17])
    assert np.isfinite(jitted(jnp.int32(10**6)))
    assert len(traced) == 2
    _, scanned = jax.lax.scan(lambda count, _: (count + 1, schedule(count)), 0, length=len(COUNTS))
    np.testing.assert_array_equal(np.asarray(scanned), expected)
    some = [*range(0, len(COUNTS), 29), *schedule.boundaries[:8], STEPS - 1, STEPS]
    for count in {min(count, len(COUNTS) - 1) for count in some}:
        np.testing.assert_array_equal(np.asarray(schedule(count)), expected[count])
    np.testing.assert_array_equal(np.asarray(schedule(jnp.int32(STEPS))), expected[STEPS])


@every_schedule
def test_values_are_finite_float32_of_the_counts_shape(name):
    assert values(name).dtype == np.float32
    assert np.isfinite(values(name)).all()
    assert (values(name) >= 0).all()
    assert built(name)(3).shape == ()
    assert built(name)(jnp.arange(6).reshape(2, 3)).shape == (2, 3)
    np.testing.assert_array_equal(built(name)(-5), values(name)[0])


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.end is not None])
def test_the_end_is_reached_at_the_last_count_and_kept(name):
    end = np.float32(SCHEDULES[name].end)
    np.testing.assert_array_max_ulp(values(name)[STEPS:], np.full(20, end), 1)


@pytest.mark.parametrize("name", [name for name, row in SCHEDULES.items() if row.falls])
def test_a_fall_never_rises_and_stays_in_bounds(name):
    steps = np.diff(values(name).astype(np.float64))
    assert steps.max() <= np.finfo(np.float32).eps * PEAK
    assert values(name).max() <= np.float32(PEAK)


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"cyclic, exp_range"}))
def test_a_shape_reaches_its_peak_and_no_more(name):
    np.testing.assert_allclose(values(name).max(), PEAK, rtol=3 * UNIT)


def test_a_schedule_goes_wherever_optax_takes_one():
    schedule = s.warmup(s.cosine(0.1, 8), 2)
    params, grads = jnp.ones(2), jnp.ones(2)
    for tx in (
        optax.sgd(schedule),
        ravine.sgd(schedule),
        optax.inject_hyperparams(optax.sgd)(learning_rate=schedule),
    ):
        state = tx.init(params)
        for count in range(4):
            updates, state = tx.update(grads, state, params)
            np.testing.assert_array_equal(updates, -schedule(count) * grads)


@pytest.mark.parametrize("count", [1.0, np.float32(2), True])
def test_counts_that_are_not_whole_are_refused(count):
    with pytest.raises(ValueError, match="whole numbers"):
        s.linear(1.0, 10)(count)


@pytest.mark.parametrize("count", [np.int64(2**31 + 5), np.int64(-(2**40)), np.array([1, 2**32])])
def test_counts_of_numpy_beyond_int32_are_refused_as_pythons_are(count):
    """They wrapped around, and the value was that of another count."""
    with pytest.raises(ValueError, match="count must be at most 2147483647"):
        s.linear(1.0, 10)(count)


@pytest.mark.parametrize("where", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_end_is_kept_up_to_the_largest_counts(where):
    schedule = s.linear(1.0, 10)
    assert where(schedule)(jnp.uint32(3_000_000_000)) == 0
    assert schedule(np.uint32(2**31 - 1)) == 0
    for by in (-1, -5, 5):
        assert where(s.shift(schedule, by))(jnp.int32(2**31 - 1)) == 0
        assert s.shift(schedule, by)(7) == schedule(7 - by)


REFUSED = {
    "steps must be a whole number of at least 1, got 0": lambda: s.linear(1.0, 0),
    "steps must be a whole number of at least 1, got -3": lambda: s.cosine(1.0, -3),
    "steps must be a whole number, got 10.0; give 10": lambda: s.linear(1.0, 10.0),
    "steps must be a whole number, got True": lambda: s.linear(1.0, True),
    "steps must be a whole number of at least 0, got -1": lambda: s.warmup(s.constant(1.0), -1),
    "peak must be a finite number": lambda: s.linear(float("nan"), 10),
    "value must be a finite number": lambda: s.constant(float("inf")),
    "end_ratio must lie in [0, 1]": lambda: s.cosine(1.0, 10, 1.5),
    "exponent must be positive": lambda: s.cosine(1.0, 10, exponent=0),
    "exponent must be positive and": lambda: s.polynomial(1.0, 10, exponent=-1),
    "exponential decay never reaches zero": lambda: s.exponential(1.0, 10, 0.0),
    "inverse decay never reaches zero": lambda: s.decay(1.0, 10, "inverse"),
    "exponential warm-up cannot start at zero": lambda: s.warmup(
        s.constant(1.0), 5, shape="exponential"
    ),
    "an exponential ramp needs both ends": lambda: s.ramp(0.0, 1.0, 5, "exponential"),
    "unknown decay shape 'cosin'; did you mean cosine": lambda: s.decay(1.0, 10, "cosin"),
    "unknown decay shape 'xyz'; known: linear": lambda: s.wsd(1.0, 10, shape="xyz"),
    "unknown ramp shape 'liner'; did you mean linear": lambda: s.warmup(
        s.constant(1.0), 5, shape="liner"
    ),
    "periods must be given for a run of one step": lambda: s.wsd_s(1.0, 1),
    "fall 0.4 must lie above rise 0.5": lambda: s.one_cycle(
        1.0, 10, rise=0.5, fall=0.4, shape="linear"
    ),
    "rise must be below 1": lambda: s.one_cycle(1.0, 10, rise=1.0),
    "unknown mode 'triangle'; did you mean triangular": lambda: s.cyclic(1.0, 5, mode="triangle"),
    "unknown interpolation 'cubic'": lambda: s.piecewise(1.0, [1], [0.5], interpolate="cubic"),
    "unknown shape of a cycle 'cosines'": lambda: s.one_cycle(1.0, 10, shape="cosines"),
    "boundaries must rise, but 3 follows 5": lambda: s.piecewise(1.0, [5, 3], [0.5, 0.2]),
    "boundaries must rise, but 2 follows 2": lambda: s.join([s.constant(1.0)] * 3, [2, 2]),
    "boundaries must be a sequence of which each is a whole number": lambda: s.join(
        [s.constant(1.0)] * 2, [2.5]
    ),
    "ratios must have 2 entries": lambda: s.piecewise(1.0, [3, 5], [0.5]),
    "boundaries must have 1 entries": lambda: s.join([s.constant(1.0)] * 2, [1, 2]),
    "nothing to join": lambda: s.join([], []),
    "nothing to multiply": lambda: s.product(),
    "warmup_steps 6 + decay_steps 5 = 11 updates, but steps is 10": lambda: s.wsd(
        1.0, 10, decay_steps=5, warmup_steps=6
    ),
    "decay_steps must be a whole number of at least 1": lambda: s.wsd(1.0, 10, decay_steps=0),
    "first_period 20 = 20 updates, but steps is 10": lambda: s.sgdr(1.0, 10, first_period=20),
    "period_factor must be at least 1": lambda: s.sgdr(1.0, 10, period_factor=0.5),
    "periods must add up to steps, but 4 + 5 = 9": lambda: s.wsd_s(1.0, 10, periods=[4, 5]),
    "cooldown_steps 8 + decay_steps 5": lambda: s.infinite_cosine(
        1.0, 10, cooldown_steps=8, decay_steps=5
    ),
    "plateau_ratio 0.01 must be above 0 and at least": lambda: s.infinite_cosine(
        1.0, 10, 0.1, plateau_ratio=0.01
    ),
    "duration must be a whole number of at least 1": lambda: s.anneal_from(s.constant(1.0), 5, 0),
    "step must be a whole number of at least 0": lambda: s.anneal_from(s.constant(1.0), -5, 1),
    "period must be a whole number of at least 1": lambda: s.repeat(s.constant(1.0), 0),
    "times must be a whole number of at least 1": lambda: s.repeat(s.constant(1.0), 3, 0),
    "by must be a whole number": lambda: s.shift(s.constant(1.0), 0.5),
    "every must be a whole number": lambda: s.step_decay(1.0, 0),
    "factor must be positive": lambda: s.step_decay(1.0, 5, 0.0),
    "rise_steps must be a whole number": lambda: s.cyclic(1.0, 0),
    "timescale must be a whole number": lambda: s.inverse_sqrt(1.0, 0),
    "warmup_steps must be a whole number": lambda: s.noam(1.0, 0),
    "exponent must be negative": lambda: s.power_law(1.0, 1, 1, exponent=0.5),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_bad_input_is_refused_when_built(complaint):
    with pytest.raises(ValueError) as refusal:
        REFUSED[complaint]()
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_warm_up_and_a_decay_of_one_update_are_legal():
    body = s.cosine(1.0, 10)
    np.testing.assert_array_equal(s.warmup(body, 0)(jnp.arange(12)), body(jnp.arange(12)))
    schedule = s.wsd(1.0, 10, decay_steps=1)
    assert [float(schedule(count)) for count in (0, 8, 9, 10, 11)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert [float(s.linear(1.0, 1)(count)) for count in (0, 1)] == [1.0, 0.0]
    assert [float(s.warmup(body, 1)(count)) for count in (0, 1)] == [1.0, 1.0]
    assert [float(s.anneal_from(body, 0, 1)(count)) for count in (0, 1)] == [1.0, 0.0]


@jax.numpy_dtype_promotion("standard")  # Optax's schedules need this
def test_operators_know_no_schedule_but_call_any():
    plain = optax.cosine_decay_schedule(1.0, 100)
    for schedule in (
        s.warmup(plain, 10),
        s.product(plain, plain),
        s.anneal_from(plain, 50, 10),
        s.rewarm(plain, 50, 10, plain),
        s.shift(plain, 5),
        s.repeat(plain, 10),
    ):
        assert np.isfinite(schedule(50))
        assert "schedule" in schedule.words


@pytest.mark.parametrize("name", ["linear", "cosine", "sgdr", "wsd", "piecewise", "repeat"])
def test_counts_of_64_bits_change_nothing(name):
    expected = values(name)
    with jax.enable_x64(True):
        wide = built(name)(jnp.arange(len(COUNTS), dtype=jnp.int64))
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(wide), expected)


def test_schedules_can_be_built_while_tracing():
    def step(count):
        return s.warmup(s.anneal_from(s.cosine(1.0, 100), 50, 10), 5)(count)

    np.testing.assert_array_equal(jax.jit(step)(57), step(57))


@pytest.mark.parametrize(("peak", "exponent"), [(1.0, -1e-3), (1e-30, -0.51)])
def test_a_power_law_may_reach_its_cap_after_more_updates_than_can_be_counted(peak, exponent):
    schedule = s.power_law(peak, 2**20, 256, exponent=exponent)
    assert schedule.boundaries == (0,)
    np.testing.assert_array_equal(schedule(jnp.array([0, 10**6])), np.float32(peak))
