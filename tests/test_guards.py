"""Guards: a fault at any position of a run leaves no trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from orbax.checkpoint import v1 as ocp
from ravine.stability import finite_gate, guarded_step, skip_step

from .tolerances import HALF, UNIT, double, furthest

STEPS = 30
WARMUP, PATIENCE, WINDOW = 4, 12, 16


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


(ROBUST,) = slow("robust")


def params():
    rng = np.random.default_rng(0)
    tree = {"matrix": rng.normal(size=(4, 3)), "vector": rng.normal(size=3)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return tree | {"zero": jnp.array([-0.0, 0.0])}  # -0 + 0 would have another bit pattern


def series(steps=STEPS, seed=1):
    """Losses and gradients of a run without outliers."""
    rng = np.random.default_rng(seed)
    noise = lambda shape: np.asarray(1 + 0.05 * rng.normal(size=(steps, *shape)), np.float32)
    grads = {k: noise(p.shape) for k, p in params().items()}
    return {"loss": noise(()), "grads": grads | {"zero": np.zeros((steps, 2), np.float32)}}


def at(batch, index):
    return jax.tree.map(lambda x: x[index], batch)


@functools.cache
def runner(kind):
    """Maps batches to weights and states after each step, in one compiled scan."""
    step = functools.partial(one_step, guard(kind))
    whole_run = jax.jit(lambda batches: jax.lax.scan(step, start(kind), batches)[1])
    return lambda batches: jax.device_get(whole_run(batches))


@functools.cache
def clean_run(kind):
    return runner(kind)(series())


def guard(kind):
    inner = optax.chain(optax.clip(1e6), ravine.adamw(1e-2, weight_decay=0.1))
    if kind == "finite":
        return finite_gate(inner)
    robust = kind == "robust"
    return skip_step(
        inner, window=WINDOW, warmup=WARMUP, patience=PATIENCE, robust=robust, deviations=6.0
    )


def start(kind):
    return params(), jax.jit(guard(kind).init)(params())


def one_step(tx, carry, batch):
    weights, state = carry
    updates, state = tx.update(batch["grads"], state, weights, loss=batch["loss"])
    carry = (optax.apply_updates(weights, updates), state)
    return carry, carry


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def untimed(inner):
    """The chain's state without the clock of its learning rate, and that clock."""
    clip, (moments, decay, rate) = inner
    return (clip, moments, rate._replace(count=0)), (int(decay.count), int(rate.count))


def assert_same_but_later(inner, expected, count):
    state, clocks = untimed(inner)
    assert bits(state) == bits(untimed(expected)[0])
    assert clocks == (count, count)


def spoil_everywhere(batch, value):
    grads = jax.tree.map(lambda g: g * np.float32(value), batch["grads"])
    return {"loss": batch["loss"], "grads": grads}


def spoil_leaf(batch, value):
    grads = batch["grads"] | {"matrix": np.full_like(batch["grads"]["matrix"], value)}
    return {"loss": batch["loss"], "grads": grads}


def spoil_element(batch, value):
    matrix = batch["grads"]["matrix"].copy()
    matrix[1, 2] = value
    return {"loss": batch["loss"], "grads": batch["grads"] | {"matrix": matrix}}


FAULTS = {
    "nan loss": lambda b: b | {"loss": np.float32(np.nan)},
    "infinite loss": lambda b: b | {"loss": np.float32(np.inf)},
    "negative infinite loss": lambda b: b | {"loss": np.float32(-np.inf)},
    "nan leaf": lambda b: spoil_leaf(b, np.nan),
    "infinite leaf": lambda b: spoil_leaf(b, np.inf),
    "nan element": lambda b: spoil_element(b, np.nan),
    "infinite element": lambda b: spoil_element(b, -np.inf),
}
SPIKES = {
    "spike of the gradient": lambda b: spoil_everywhere(b, 1e3),
    "spike of the loss": lambda b: b | {"loss": b["loss"] * np.float32(1e3)},
}


def insert(batches, position, bad):
    """The batches with the batch `bad` inserted before that position."""
    put = lambda x, new: np.concatenate([x[:position], new[None], x[position:]])
    return jax.tree.map(put, batches, bad)


def assert_no_trace(kind, clean, position, bad_ones):
    """The steps and guards after the bad batches equal those of a run that never saw them."""
    batches = clean
    for bad in bad_ones:
        batches = insert(batches, position, bad)
    history = runner(kind)(batches)
    expected = clean_run(kind)
    number = len(bad_ones)
    for step in range(STEPS + number):
        before = step if step < position else max(step - number, position - 1)
        weights, state = at(history, step)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(weights))
        if before < 0:
            assert bits(weights) == bits(params())
            assert_same_but_later(state.inner, start(kind)[1].inner, step + 1)
            continue
        other_weights, other_state = at(expected, before)
        assert bits(weights) == bits(other_weights)
        assert_same_but_later(state.inner, other_state.inner, step + 1)
        if kind != "finite":
            assert bits((state.losses, state.norms)) == bits(
                (other_state.losses, other_state.norms)
            )
    last = at(history, -1)[1]
    assert int(last.skipped) == number
    assert int(last.in_a_row) == (number if position == STEPS else 0)
    return last


@pytest.mark.parametrize("kind", ["finite", "skip", ROBUST])
@pytest.mark.parametrize("fault", FAULTS)
def test_non_finite_values_leave_no_trace_at_any_position(kind, fault):
    clean = series()
    for position in range(STEPS + 1):
        bad = FAULTS[fault](at(clean, min(position, STEPS - 1)))
        last = assert_no_trace(kind, clean, position, [bad])
        if kind != "finite":
            assert int(last.not_finite) == 1


@pytest.mark.parametrize("kind", ["skip", ROBUST])
@pytest.mark.parametrize("fault", SPIKES)
def test_a_spike_leaves_no_trace_at_any_position(kind, fault):
    clean = series()
    for position in range(WARMUP, STEPS + 1):
        bad = SPIKES[fault](at(clean, min(position, STEPS - 1)))
        assert int(assert_no_trace(kind, clean, position, [bad]).not_finite) == 0


@pytest.mark.parametrize("kind", ["skip", ROBUST])
def test_ten_spikes_in_a_row_leave_no_trace_at_any_position(kind):
    clean = series()
    for position in range(WARMUP, STEPS + 1):
        bad = SPIKES["spike of the gradient"](at(clean, min(position, STEPS - 1)))
        assert_no_trace(kind, clean, position, [bad] * 10)


def test_non_finite_values_do_not_use_up_patience():
    clean = series()
    spike = SPIKES["spike of the loss"](at(clean, 0))
    nan = FAULTS["nan loss"](at(clean, 0))
    last = assert_no_trace("skip", clean, 10, [nan] * (PATIENCE + 1) + [spike])
    assert int(last.not_finite) == PATIENCE + 1


@pytest.mark.parametrize("kind", ["skip", ROBUST])
@pytest.mark.parametrize("position", [WARMUP, *slow(13, 25)])
def test_a_true_shift_of_level_is_let_in_after_patience_and_becomes_the_level(kind, position):
    low, high = series(position), spoil_everywhere(series(STEPS, seed=2), 1e3)
    high["loss"] = high["loss"] + np.float32(5)
    batches = jax.tree.map(lambda a, b: np.concatenate([a, b]), low, high)
    history = runner(kind)(batches)
    skipped = np.asarray(history[1].skipped)
    # Skipped exactly `patience` times, then never again.
    np.testing.assert_array_equal(skipped[position : position + PATIENCE], 1 + np.arange(PATIENCE))
    assert np.all(skipped[position + PATIENCE :] == PATIENCE)
    assert int(at(history, position + PATIENCE)[1].losses.count) == 1
    # The guard now works at the new level: a spike above it is skipped.
    weights, state = jax.tree.map(jnp.asarray, at(history, -1))
    spike = SPIKES["spike of the gradient"](at(high, -1))
    (after, state), _ = one_step(guard(kind), (weights, state), spike)
    assert bits(after) == bits(weights)
    assert int(state.skipped) == PATIENCE + 1


def test_non_finite_values_are_never_let_in():
    clean = at(series(), 0)
    bad = FAULTS["nan element"](clean)
    batches = jax.tree.map(lambda x: np.broadcast_to(x, (3 * PATIENCE, *np.shape(x))), bad)
    weights, state = at(runner("skip")(batches), -1)
    assert bits(weights) == bits(params())
    assert int(state.in_a_row) == 3 * PATIENCE
    assert int(state.outliers) == 0


@pytest.mark.parametrize("size", [1, 0])
def test_a_constant_series_has_no_outliers(size):
    """Nor has one of zeros, such as a policy's loss when all rewards are the same."""
    clean = jax.tree.map(lambda x: x * np.float32(size), at(series(), 0))
    batches = jax.tree.map(lambda x: np.broadcast_to(x, (STEPS, *np.shape(x))), clean)
    batches["loss"] = np.float32(batches["loss"] * (1 + 1e-6 * np.arange(STEPS)))
    assert int(at(runner("skip")(batches), -1)[1].skipped) == 0


def optax_injected(rate):
    return optax.inject_hyperparams(optax.sgd)(rate)


@pytest.mark.parametrize("build", [ravine.sgd, ravine.adamw, optax.sgd, optax_injected])
@pytest.mark.parametrize("wrap", [finite_gate, functools.partial(skip_step, warmup=1)])
def test_schedules_go_on_while_steps_are_skipped(build, wrap):
    rates = 0.1 * 2.0 ** -np.arange(10)
    tx = wrap(build(lambda count: jnp.asarray(rates, jnp.float32)[count]))
    weights = jnp.zeros(3)  # so decay has no effect
    state, used = tx.init(weights), []
    update = jax.jit(tx.update)
    for step in range(10):
        bad = step in (3, 4, 7)
        grads = jnp.full(3, jnp.nan if bad else 1.0)
        updates, state = update(grads, state, weights, loss=jnp.float32(1.0))
        used.append(float(-updates[0]))
        counts = [int(count) for _, count in optax.tree.get_all_with_path(state.inner, "count")]
        made = step + 1 - int(state.skipped)
        expected = [made] if build is ravine.adamw else []
        assert counts == expected + [step + 1] * (len(counts) - len(expected))
    expected = np.where(np.isin(np.arange(10), (3, 4, 7)), 0.0, rates)
    # Each of the four operations on the moments rounds once in each of the ten steps.
    np.testing.assert_allclose(used, expected, rtol=40 * UNIT)


def test_a_skipped_micro_step_is_not_counted_by_accumulate():
    tx = finite_gate(ravine.accumulate(ravine.sgd(0.1), 2))
    _, state = tx.update(jnp.full(2, jnp.nan), tx.init(jnp.ones(2)), jnp.ones(2))
    assert int(optax.tree.get(state.inner.inner, "count")) == 0


def test_averages_are_weighted_by_the_rate_of_the_step():
    rate = lambda count: jnp.float32(1.0) + count.astype(jnp.float32)
    tx = finite_gate(ravine.schedule_free_sgd(rate))
    state = tx.init(jnp.ones(2))
    for grads in (jnp.full(2, jnp.nan), jnp.ones(2)):
        _, state = tx.update(grads, state, jnp.ones(2))
    assert float(state.inner.peak) == 2.0
    assert int(state.inner.count) == 1


@pytest.mark.parametrize("kind", ["finite", "skip"])
def test_buffers_may_be_donated(kind):
    step = jax.jit(functools.partial(one_step, guard(kind)), donate_argnums=0)
    (_, state), _ = step(start(kind), at(series(), 0))
    assert int(state.skipped) == 0


def test_the_state_is_constant_and_restores_from_a_checkpoint(tmp_path):
    clean = series()
    init = start("skip")
    once = jax.eval_shape(functools.partial(one_step, guard("skip")), init, at(clean, 0))[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), init) == jax.tree.map(
        lambda x: (x.shape, x.dtype), once
    )
    middle = jax.tree.map(jnp.asarray, at(runner("skip")(clean), 19))
    ocp.save(tmp_path / "state", middle)
    restored = ocp.load(tmp_path / "state", jax.tree.map(ocp.arrays.to_shape_dtype_struct, middle))
    step = functools.partial(one_step, guard("skip"))
    rest = jax.tree.map(lambda x: x[20:], clean)
    (again, _), (expected, _) = (jax.lax.scan(step, carry, rest)[0] for carry in (restored, middle))
    assert bits(again) == bits(expected)


@pytest.mark.parametrize("dtype", [jnp.float16, *slow(jnp.bfloat16)])
def test_low_precision_gradients_and_extra_arguments_pass(dtype):
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(sorted(extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = skip_step(inner, warmup=1)
    grads = jnp.full(1000, 300.0, dtype)  # the square overflows in float16
    updates, state = tx.update(grads, tx.init(grads), grads, loss=1.0, curvature=2.0)
    assert seen == [["curvature", "loss"]]
    assert updates.dtype == dtype
    # One rounding for each of the 1000 summed squares, halved by the root.
    assert float(state.norms.values[0]) == pytest.approx(300 * 1000**0.5, rel=500 * UNIT)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"warmup": 200}, "warmup must be at most the window of 128"),
        ({"patience": 0}, "patience must be a whole number"),
        ({"deviations": 0.0}, "deviations must be positive"),
    ],
)
def test_bad_input_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        skip_step(ravine.sgd(0.1), **options)


@pytest.mark.parametrize("guard", [finite_gate, skip_step])
def test_a_loss_for_each_example_is_refused(guard):
    tx, params = guard(ravine.sgd(0.5)), jnp.ones(2)
    call = lambda: tx.update(params, tx.init(params), params, loss=jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"loss must be one number, got shape \(2,\); give its mean"
    ):
        call()
    with pytest.raises(ValueError, match="loss must be one number"):
        guarded_step(tx, params, tx.init(params), params, loss=jnp.ones((1, 1)))


def test_a_missing_loss_is_refused():
    tx = skip_step(ravine.sgd(0.1))
    with pytest.raises(ValueError, match="skip_step needs loss"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))


@pytest.mark.parametrize("kind", ["finite", "plain", ROBUST])
def test_a_guarded_step_is_update_and_addition(kind):
    """In float64, because two programs may round differently; a skipped step keeps the exact bits."""
    tx, faults = guard(kind), series()
    faults["loss"][9] = np.nan
    faults["grads"]["matrix"][11, 0, 0] = np.inf
    faults["loss"][15:18] = 50.0

    def step(carry, batch):
        weights, state = carry
        done = guarded_step(tx, batch["grads"], state, weights, loss=batch["loss"])
        return (done.params, done.state), (done.params, done.state)

    with jax.enable_x64(True):
        first = double(params())
        first = first, tx.init(first)
        over = lambda step: jax.jit(lambda batches: jax.lax.scan(step, first, batches)[1])
        batches = jax.tree.map(np.float64, faults)
        weights, state = found = jax.device_get(over(step)(batches))
        assert furthest(found, over(functools.partial(one_step, tx))(batches)) <= HALF
    (skipped,) = np.nonzero(np.diff(state.skipped, prepend=0))
    assert len(skipped) == (2 if kind == "finite" else 5)
    for index in skipped:
        assert bits(at(weights, index)) == bits(at(weights, index - 1))


def test_only_guards_make_guarded_steps():
    with pytest.raises(TypeError, match="put the guard outermost"):
        guarded_step(ravine.sgd(0.1), params(), None, params())
