"""What schedules control besides the learning rate, the averages that replace them, and scaling."""

import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine import schedules as s
from ravine.schedules import BatchSizes, Run, examples, fraction, steps, tokens
from ravine.schedules.shapes import DECAYS

from .schedules_table import SCHEDULE
from .tolerances import UNIT

COUNTS = jnp.arange(200)


def test_durations_are_resolved_with_a_constant_batch():
    run = Run(tokens(1e6), batch=8, context=1000)
    assert run.steps == 125
    assert [run.count(d) for d in (steps(1), examples(9), tokens(8001), fraction(1))] == [
        1,
        2,
        2,
        125,
    ]
    assert run.ticks(tokens(16_000)) == 2


def test_one_is_what_its_unit_says():
    run = Run(steps(50), batch=1)
    assert run.count(steps(1)) == 1
    assert run.count(fraction(1)) == 50


def test_durations_in_tokens_depend_on_the_batch_where_they_start():
    run = Run(steps(20), batch=BatchSizes((4, 8), (10,)), context=10)
    assert run.count(tokens(80)) == 2
    assert run.count(tokens(80), start=10) == 1
    assert run.count(tokens(80), start=9) == 2
    assert run.ticks(steps(11)) == 12
    assert run.ticks(fraction(0.5)) == 15


def test_a_schedule_in_tokens_follows_a_growing_batch():
    batch = BatchSizes((4, 8, 12), (10, 20))
    run = Run(examples(4 * 10 + 8 * 10 + 12 * 20), batch, context=5)
    by_data = s.cosine(1.0, run.ticks(tokens(360 * 5)), 0.1)
    followed = s.follow_data(by_data, batch)
    seen = [batch.data_offset(count) for count in range(50)]
    x = np.minimum(np.array(seen) / 360, 1)
    expected = 0.1 + 0.45 * (1 + np.cos(np.pi * x))
    np.testing.assert_allclose(followed(jnp.arange(50)), expected, rtol=0, atol=SCHEDULE)
    assert followed.boundaries == (0, 10, 20, run.steps)
    np.testing.assert_array_equal(jax.jit(followed)(COUNTS), followed(COUNTS))
    # With a constant batch, the schedule is unchanged.
    same = s.follow_data(s.cosine(1.0, 100), BatchSizes((16,)))
    np.testing.assert_array_equal(same(COUNTS), s.cosine(1.0, 100)(COUNTS))


def test_batch_sizes_are_looked_up_right_continuously_at_int32_and_beyond():
    batch = BatchSizes((4, 8), (10,))
    assert [int(batch(count)) for count in (9, 10)] == [4, 8]
    assert batch(jnp.arange(3)).dtype == jnp.int32
    huge = BatchSizes((2**20, 2**21), (10**6,))
    assert huge.data_offset(2 * 10**6) == 10**6 * 3 * 2**20  # not exact in float64
    assert huge.count_at(10**6 * 2**20 + 1) == 10**6 + 1


def test_megatron_ramp():
    """The size increases with consumed samples: 4 + 4 * floor(consumed / (100 / 3))."""
    batch = s.batch_ramp(4, 16, 4, examples=100)
    consumed, expected = 0, []
    for _ in range(30):
        expected.append(4 + 4 * min(3, 3 * consumed // 100))
        consumed += expected[-1]
    assert [int(size) for size in batch(jnp.arange(30))] == expected


def test_seesaw_spends_the_same_data_in_fewer_updates():
    T, B, factor = 3000, 100, 0.95

    def quarter_cosine(count):
        return jnp.cos(0.5 * jnp.pi * jnp.asarray(count, jnp.float32) / T)

    rate, batch = s.seesaw(quarter_cosine, T, B, factor)
    updates = batch.count_at(T * B)
    # In the paper's limit, the share 2 / pi of the updates remains. Before its next increase a batch is
    # too small by up to the factor, and rounding to whole examples changes sizes by up to 0.5 of 100.
    limit, whole = 2 / math.pi, 0.5 / B
    assert limit * (1 - whole) <= updates / T <= limit / factor * (1 + whole)
    counts = jnp.arange(updates)
    sizes = np.asarray(batch(counts), np.float64)
    # Rate times the square root of the batch size is constant over all updates. The roundings are those
    # of the peak, the ratio and their product.
    np.testing.assert_allclose(rate(counts)[1:] * np.sqrt(sizes)[1:], math.sqrt(B), rtol=4 * UNIT)
    assert (np.diff(sizes) >= 0).all()
    halved, doubled = s.seesaw(s.warmup(s.linear(1.0, 90), 10), 100, 8)
    assert doubled.sizes[:2] == (8, 16)
    ratio = float(halved(doubled.boundaries[0])) / float(halved(doubled.boundaries[0] - 1))
    np.testing.assert_allclose(ratio, math.sqrt(0.5), rtol=4 * UNIT)
    ramp = (np.arange(9) + 1) / 10
    np.testing.assert_allclose(halved(jnp.arange(9)), ramp, rtol=0, atol=SCHEDULE)


def test_a_seesaw_of_many_small_cuts_follows_its_schedule_to_the_end():
    """It stopped after 64 cuts, here at the reference rate of 0.53."""
    rate, batch = s.seesaw(s.linear(1.0, 1000), 1000, 1000, 0.99)
    counts = np.arange(1, batch.count_at(950 * 1000))
    left = np.array([1 - batch.data_offset(int(count)) / 10**6 for count in counts])
    # A cut comes with the first update after the schedule has fallen by 1 %; one update is up to
    # 20 times 0.1 % of the data, so up to 2 % of the whole schedule, of which 5 % are left.
    np.testing.assert_allclose(np.asarray(rate(counts)) ** 2, left, rtol=0.011, atol=0.02)
    assert batch.sizes[-1] > 20 * 1000


@pytest.mark.parametrize("batch_size", [4096, 500_000, 50])
def test_data_beyond_int32_is_counted_exactly(batch_size):
    batch = BatchSizes((batch_size, batch_size + 1001, 7 * batch_size + 3), (7, 10**6))
    counts = [0, 7, 8, 999_999, 10**6, 10**6 + 1, 2 * 10**6 + 12_345, 3 * 10**8, 5 * 10**8]
    whole, rest, per_batch = batch.batches_at(jnp.array(counts), batch_size)
    found = list(zip(whole.tolist(), rest.tolist(), strict=True))
    exact = [divmod(batch.data_offset(count), batch_size) for count in counts]
    assert per_batch == batch_size
    assert found[:-1] == exact[:-1]
    # 5e8 updates are more reference updates than int32 holds, so the schedule stays at its last count.
    assert exact[-1][0] >= 2**31 - 1
    assert found[-1] == (2**31 - 2, 0)


def test_a_bounded_seesaw_of_many_examples_falls_to_the_end():
    reference, steps = s.cosine(1.0, 10**6), 10**6
    rate, batch = s.seesaw(reference, steps, 4096, 0.7, largest=8000)
    at = np.arange(batch.boundaries[-1] + 1, batch.count_at(steps * 4096), 10_000)
    seen = [batch.data_offset(int(count)) / 4096 for count in at]
    expected = (
        0.5 * (1 + np.cos(np.pi * np.array(seen) / steps)) * math.sqrt(batch.sizes[-1] / 4096)
    )
    # Between two counts the interpolation error is (pi / steps)^2 / 16, which is negligible. The
    # learning rate is multiplied by the root of the growth of the batch, which is less than 2.
    np.testing.assert_allclose(rate(jnp.asarray(at)), expected, rtol=0, atol=2 * SCHEDULE)
    assert rate.boundaries[-1] == batch.count_at(steps * 4096)


def test_half_lives():
    beta = s.decay_rate(100)
    np.testing.assert_allclose(beta**100, 0.5)
    np.testing.assert_allclose(s.half_life(beta), 100)
    np.testing.assert_allclose(s.decay_rate(10e6, 2**19) ** (10e6 / 2**19), 0.5)
    b2 = s.half_life_in_tokens(6400, BatchSizes((4, 8), (10,)), context=16)
    np.testing.assert_allclose(float(b2(9)) ** 100, 0.5, rtol=100 * UNIT)
    np.testing.assert_allclose(float(b2(10)) ** 50, 0.5, rtol=50 * UNIT)


def test_the_horizon_of_an_average_grows():
    horizon = np.asarray(1 / (1 - s.ema_horizon(50, 0.5)(COUNTS)), np.float64)
    # One minus a rate near 1: the rounding of the rate is magnified 50 times.
    np.testing.assert_allclose(
        horizon, np.minimum(50, 1 + 0.5 * np.arange(200)), rtol=(50 + 4) * UNIT
    )
    schedule = s.ema_horizon(50, 0.3)
    np.testing.assert_array_equal(jax.jit(schedule)(COUNTS), schedule(COUNTS))


@pytest.mark.parametrize("rate", [s.linear(0.1, 40), s.warmup(s.cosine(0.1, 30), 10)])
def test_weight_decay_shrinks_weights_as_each_form_says(rate):
    """The weights get no gradient, and SGD applies the coupled form of decay."""

    def shrink(coefficient):
        tx = optax.chain(
            ravine.add_decayed_weights(coefficient), ravine.optimizers.scale_by_learning_rate(rate)
        )
        params, state, shares = jnp.ones(1), tx.init(jnp.ones(1)), []
        for _ in range(40):
            updates, state = tx.update(jnp.zeros(1), state, params)
            shares.append(float(-updates[0] / params[0]))
            params = params + updates
        return np.array(shares)

    eta = np.asarray(rate(jnp.arange(40)), np.float64)
    # At most a hundredth of a weight, with at most eight roundings.
    close = {"rtol": 0, "atol": 8 * UNIT * 1e-2}
    np.testing.assert_allclose(shrink(s.coupled_decay(0.1)), 0.1 * eta, **close)
    np.testing.assert_allclose(shrink(s.independent_decay(1e-2, rate)), np.full(40, 1e-2), **close)
    np.testing.assert_allclose(
        shrink(s.independent_decay(1e-2, rate, s.linear(1.0, 40))),
        1e-2 * (1 - np.arange(40) / 40),
        **close,
    )
    np.testing.assert_allclose(
        shrink(s.adamc_decay(0.1, rate, peak=0.1)), 0.1 * eta**2 / 0.1, **close
    )
    np.testing.assert_allclose(
        shrink(s.decay_to_none(0.1, 40, "linear")), eta * 0.1 * (1 - np.arange(40) / 40), **close
    )


def test_momentum_and_second_moment_follow_their_schedules():
    b1 = s.momentum(0.5, 0.9, 2, 10, end=0.8, cooldown_steps=2)
    b2 = s.half_life_in_tokens(64, BatchSizes((4, 8), (2,)), context=4)
    tx = optax.inject_hyperparams(ravine.adam)(learning_rate=0.1, b1=b1, b2=b2)
    state = tx.init(jnp.ones(1))
    for count in range(10):
        _, state = tx.update(jnp.ones(1), state, jnp.ones(1))
        np.testing.assert_allclose(state.hyperparams["b1"], b1(count))
        np.testing.assert_allclose(state.hyperparams["b2"], b2(count))


def trajectory(n, seed=0):
    walk = np.random.default_rng(seed).normal(size=(n + 1, 3)).cumsum(axis=0)
    return [{"w": jnp.asarray(row, jnp.float32)} for row in walk]


@pytest.mark.parametrize("decay", [0.0, 0.9, s.ema_horizon(10)])
def test_ema_is_the_merge_with_its_weights(decay):
    path = trajectory(30)
    tx = s.ema(decay)
    state = tx.init(path[0])
    update = jax.jit(tx.update)
    for params in path[1:]:
        state = update(params, state)
    merged = s.merge(path, s.ema_weights(decay, 30))
    # The average rounds five times per update, and forgets nine tenths of that within 10 updates or
    # more. The merge rounds once per product and sum, and its weights add up to 1.
    largest = np.max([abs(p["w"]) for p in path])
    bound = (5 * 10 + 31 + 1) * UNIT * largest
    np.testing.assert_allclose(tx.average(state)["w"], merged["w"], rtol=0, atol=bound)


@pytest.mark.parametrize("every", [1, 3])
def test_lawa_is_the_mean_of_the_latest_checkpoints(every):
    path = trajectory(20)
    bound = 8 * UNIT * np.max([abs(p["w"]) for p in path])  # four sums and a division
    tx = s.lawa(window=4, every=every)
    state = tx.init(path[0])
    np.testing.assert_array_equal(tx.average(state)["w"], path[0]["w"])
    update = jax.jit(tx.update)
    for count, params in enumerate(path[1:], start=1):
        state = update(params, state)
        latest = list(range(every, count + 1, every))[-4:] or [0]
        mean = np.mean([path[i]["w"] for i in latest], axis=0, dtype=np.float64)
        np.testing.assert_allclose(tx.average(state)["w"], mean, rtol=0, atol=bound)


def test_averages_of_bfloat16_parameters_are_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    for tx in (s.ema(0.999), s.lawa(2)):
        state = tx.update(params, tx.init(params))
        assert tx.average(state)["w"].dtype == jnp.float32


def test_a_merge_does_the_work_of_a_decay():
    """SGD on fixed gradients: merging constant-rate checkpoints equals running the decay."""
    gradients = np.random.default_rng(1).normal(size=(25, 3))
    decay = np.asarray(s.one_minus_sqrt(1.0, 25)(jnp.arange(25)), np.float64)
    constant_rate = np.concatenate([np.zeros((1, 3)), -np.cumsum(gradients, axis=0)])
    merged = s.merge_weights(decay) @ constant_rate
    # Two sums of 25 products of sums, in float64.
    bound = 4 * 25 * 2.0**-53 * abs(gradients).sum()
    expected = -(decay[:, None] * gradients).sum(axis=0)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=bound)
    uniform = s.decay_of_merge(np.full(26, 1 / 26))
    np.testing.assert_allclose(uniform, 1 - np.arange(1, 26) / 26)


def test_update_weights_are_what_adamw_leaves_of_each_update():
    rate, decay = s.warmup(s.cosine(0.3, 20, 0.1), 5), 0.5
    theta, directions = np.array([2.0]), np.random.default_rng(2).normal(size=25)
    left = theta.copy()
    for count, u in enumerate(directions):
        eta = float(rate(count))
        left = left - eta * (u + decay * left)
    weights = s.update_weights(rate, decay, 25)
    np.testing.assert_allclose(weights.initial * theta - weights.updates @ directions / decay, left)
    np.testing.assert_allclose(weights.initial + weights.updates.sum(), 1.0)
    half = s.update_weights(rate, s.constant(decay), 25)
    np.testing.assert_allclose(half.updates, weights.updates)


def test_scaling_rules():
    assert s.scale_learning_rate(1e-3, 4) == 2e-3
    assert s.scale_learning_rate(1e-3, 4, "linear") == 4e-3
    np.testing.assert_allclose(s.scale_beta(0.9, 2), 0.81)
    np.testing.assert_allclose(s.scale_beta(0.9, 2, "sde"), 0.8)
    # The half-life in tokens does not change.
    np.testing.assert_allclose(s.half_life(s.scale_beta(0.95, 3), 3), s.half_life(0.95))
    assert s.scale_eps(1e-8, 4) == 5e-9
    # The time scale as a share of the run does not change.
    rate, decay = s.scale_learning_rate(1e-3, 4), s.scale_weight_decay(0.1, 4, 3)
    np.testing.assert_allclose(
        s.time_scale(rate, decay, 1000 * 3 // 4), s.time_scale(1e-3, 0.1, 1000)
    )
    wide = s.scale_with_width(1e-2, 0.1, 4)
    np.testing.assert_allclose(s.time_scale(*wide), s.time_scale(1e-2, 0.1))


REFUSED = {
    "steps must be a whole number of at least 0, got 1.5": lambda: steps(1.5),
    "tokens must be a whole number of at least 0, got -1": lambda: tokens(-1),
    "fraction must lie in [0, 1], got 2": lambda: fraction(2),
    "unknown unit 'step'; did you mean steps": lambda: s.Duration(3, "step"),
    "10 has no unit; write steps(10)": lambda: Run(steps(50), 1).count(10),
    "length must be steps(...)": lambda: Run(fraction(0.5), 1),
    "needs the context": lambda: Run(tokens(100), 1),
    "sizes must have 2 entries": lambda: BatchSizes((4,), (10,)),
    "boundaries must rise": lambda: BatchSizes((4, 8, 16), (10, 5)),
    "sizes must be a whole number of at least 1, got 0": lambda: BatchSizes((0,)),
    "increment 3 must divide": lambda: s.batch_ramp(4, 8, 3, 100),
    "more than int32 counts": lambda: s.follow_data(
        s.constant(1.0), BatchSizes((2**20, 2**20 + 1), (10**6,))
    ),
    "are counted up to 536870912": lambda: s.follow_data(
        s.constant(1.0), BatchSizes((2**30, 2**30 + 1), (10,)), 2**30
    ),
    "factor 0.9999 cuts the schedule more than 1000 times": lambda: s.seesaw(
        s.linear(1.0, 100), 100, 1000, 0.9999
    ),
    "factor must lie between 0 and 1": lambda: s.seesaw(s.constant(1.0), 10, 1, 1.0),
    "half_life must be positive": lambda: s.decay_rate(0),
    "decay_rate must lie between 0 and 1": lambda: s.half_life(1.0),
    "horizon must be at least 1": lambda: s.ema_horizon(0.5),
    "peak must lie in [0, 1)": lambda: s.momentum(0.5, 1.0, 10, 100),
    "warmup_steps 10 + cooldown_steps 95": lambda: s.momentum(0.5, 0.9, 10, 100, cooldown_steps=95),
    "weight_decay must not be negative": lambda: s.coupled_decay(-0.1),
    "weight_decay must be a finite number": lambda: s.adamc_decay(
        float("nan"), s.constant(1.0), 1.0
    ),
    "decay must lie in [0, 1)": lambda: s.ema(1.0),
    "window must be a whole number": lambda: s.lawa(0),
    "weights must have 2 entries": lambda: s.merge([1, 2], [1.0]),
    "weights must add up to 1": lambda: s.merge([jnp.ones(1)] * 2, [1.0, 1.0]),
    "decay must fall within": lambda: s.merge_weights([0.5, 0.6]),
    "unknown rule 'squared'": lambda: s.scale_learning_rate(1.0, 2, "squared"),
    "the SDE rule takes beta": lambda: s.scale_beta(0.5, 4, "sde"),
    "batch_ratio must be positive": lambda: s.scale_eps(1e-8, 0),
    "unknown schedule 'cosin'; did you mean cosine": lambda: s.for_run("cosin", 1.0, 10),
    "warmup_steps 10 + at least one update": lambda: s.for_run("cosine", 1.0, 10, warmup_steps=10),
    "unknown option of wsd 'decay_step'; did you mean decay_steps": lambda: s.parse_options(
        "wsd", "decay_step=4"
    ),
    "written name=value": lambda: s.parse_options("wsd", "4"),
    "nothing to plot": lambda: s.plot(steps=10),
    "labels must have 1 entries": lambda: s.plot(s.constant(1.0), steps=10, labels=[]),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_bad_input_is_refused(complaint):
    with pytest.raises(ValueError) as refusal:
        REFUSED[complaint]()
    assert complaint in str(refusal.value)


@pytest.mark.parametrize("name", s.schedule_names())
def test_every_name_gives_a_schedule_over_a_run(name):
    schedule = s.for_run(name, 2.0, 100, warmup_steps=10, batch_size=16, context=64)
    values = np.asarray(jax.jit(schedule)(jnp.arange(100)))
    assert np.isfinite(values).all()
    assert values.max() == 2.0
    assert values[0] < 0.5  # all of them rise first
    line = s.describe(schedule)
    assert "\n" not in line
    assert " at 0" in line


def test_a_description_tells_phases_boundaries_and_values():
    schedule = s.warmup(s.anneal_from(s.cosine(1.0, 900), 450, 50, "linear"), 100)
    assert s.describe(schedule) == (
        "linear warm-up, then cosine, then linear: "
        "0.01 at 0, 1 at 99, 1 at 100, 0.5 at 550, 0 at 600"
    )
    assert s.describe(s.sgdr(1.0, 240)).endswith(
        "1 at 0, 0.002133 at 33, 1 at 34, 0.0005182 at 102, 1 at 103, 0 at 240"
    )
    assert s.describe(s.sgdr(1.0, 1000, first_period=50, period_factor=1)).count("...") == 1
    assert s.describe(optax.constant_schedule(0.5)).endswith(": 0.5 at 0")


def test_the_gallery_shows_every_shape():
    path = Path(__file__).parents[1] / "docs" / "schedules_gallery.py"
    gallery = runpy.run_path(str(path))
    titles = [axes.get_title() for axes in gallery["gallery"]().axes]
    assert set(s.schedule_names()) <= set(titles)
    assert {f"wsd, {shape}" for shape in DECAYS} <= set(titles)


def test_a_plot_has_a_line_a_label_and_units():
    figure = s.plot(s.cosine(1e-3, 50), s.constant(1e-3), steps=50, labels=["one", "two"])
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["one", "two"]
    assert axes.get_xlabel() == "updates made"
    assert axes.lines[0].get_ydata()[-1] == 0.0
    assert axes.get_legend() is not None
