"""Accumulation: the inner optimizer runs only when an update is due, and gets the right mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.training.gradients import micro_batch_value_and_grad

from .tolerances import HALF, UNIT, furthest


def test_the_inner_optimizer_runs_once_per_emission():
    runs = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return updates, state

    counting = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = ravine.accumulate(
        optax.chain(counting, ravine.sgd(lambda count: jnp.where(count == 0, 1.0, 2.0))), 4
    )
    params = jnp.zeros(2)
    state, step, found = tx.init(params), jax.jit(tx.update), []
    for i in range(8):
        updates, state = step(jnp.full(2, float(i)), state, params)
        found.append(float(updates[0]))
    jax.effects_barrier()
    assert len(runs) == 2
    # The means are 1.5 and 5.5; the second emission is the second count of the schedule.
    assert found == [0, 0, 0, -1.5, 0, 0, 0, -11.0]
    assert int(state.count) == 2


def test_the_mean_is_weighted_by_tokens_and_kept_in_float32():
    tx = ravine.accumulate(ravine.sgd(1.0), 3)
    params = jnp.zeros(1, jnp.bfloat16)
    state = tx.init(params)
    assert state.buffer.dtype == jnp.float32
    # In bfloat16, 256 + 1 is 256.
    for grads, tokens in ((256.0, 1), (1.0, 2), (-256.0, 1)):
        assert float(state.count) == 0
        updates, state = tx.update(jnp.array([grads], jnp.bfloat16), state, params, tokens=tokens)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(jnp.float32), [-0.5])
    assert float(state.tokens) == 0


def test_a_micro_batch_without_tokens_counts_for_nothing_even_if_it_is_nan():
    tx = ravine.accumulate(ravine.sgd(1.0), 2)
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.full(1, jnp.nan), state, tokens=jnp.int32(0))
    updates, state = tx.update(jnp.full(1, 3.0), state, tokens=jnp.int32(5))
    np.testing.assert_array_equal(updates, [-3.0])
    for _ in range(2):  # no tokens at all
        updates, state = tx.update(jnp.full(1, jnp.nan), state, tokens=jnp.int32(0))
    np.testing.assert_array_equal(updates, [0.0])


def test_equals_one_large_batch_for_an_optimizer_with_state():
    params = {"w": jnp.ones(3)}
    grads = [{"w": jnp.array([1.0, -2.0, 0.5]) * (i + 1)} for i in range(6)]
    tx = ravine.accumulate(ravine.adamw(0.1, weight_decay=0.1), 3)
    state, plain = tx.init(params), ravine.adamw(0.1, weight_decay=0.1)
    other, plain_state, update = params, plain.init(params), jax.jit(tx.update)
    for at in range(6):
        updates, state = update(grads[at], state, params)
        params = optax.apply_updates(params, updates)
        if at % 3 == 2:
            mean = jax.tree.map(lambda *g: sum(g) / 3, *grads[at - 2 : at + 1])
            updates, plain_state = plain.update(mean, plain_state, other)
            other = optax.apply_updates(other, updates)
    # Two updates of 0.1 have 16 roundings each; the parameter has one for each update, in both programs.
    np.testing.assert_allclose(params["w"], other["w"], rtol=8 * UNIT)


def test_every_may_follow_the_updates_made_and_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor):
        return optax.tree.scale(factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = ravine.accumulate(inner, lambda count: 1 + count)
    state, found = tx.init(jnp.zeros(1)), []
    for _ in range(6):
        updates, state = tx.update(jnp.ones(1), state, factor=2.0)
        found.append(float(updates[0]))
    assert found == [2, 0, 2, 0, 0, 2]


def test_nan_reaches_the_update_of_its_leaf_only_and_is_gone_afterwards():
    tx = ravine.accumulate(ravine.sgd(1.0), 2)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    good = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = tx.init(params)
    _, state = tx.update(good | {"a": jnp.full(1, jnp.nan)}, state, params)
    updates, state = tx.update(good, state, params)
    assert jnp.isnan(updates["a"][0])
    assert float(updates["b"][0]) == -1.0
    _, state = tx.update(good, state, params)
    updates, _ = tx.update(good, state, params)
    assert float(updates["a"][0]) == -1.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_state_is_a_fixed_point_under_scan_with_gradients_of_another_dtype(dtype):
    tx = ravine.accumulate(ravine.muon(0.1, rules=[("", "matrix")]), 2)
    params = {"kernel": jnp.ones((4, 3), dtype)}
    grads = {"kernel": jnp.ones((4, 3))}

    def step(state, _):
        updates, state = tx.update(grads, state, params)
        return state, updates

    _, updates = jax.eval_shape(lambda s: jax.lax.scan(step, s, length=2), tx.init(params))
    assert updates["kernel"].dtype == jnp.float32


def test_accumulate_refuses_less_than_one():
    with pytest.raises(ValueError, match="every must be at least 1"):
        ravine.accumulate(ravine.sgd(1.0), 0)


def regression(params, batch):
    inputs, targets = batch
    return jnp.mean(jnp.square(inputs @ params["w"] - targets))


def regression_batch(rows):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (rows, 3)), jax.random.normal(keys[1], (rows,))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_scanned_gradients_equal_those_of_the_whole_batch(micro_batches):
    params, batch = {"w": jnp.arange(3.0)}, regression_batch(8)
    expected = jax.value_and_grad(regression)(params, batch)
    found = jax.jit(micro_batch_value_and_grad(regression, micro_batches))(params, batch)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(found))
    assert furthest(found, expected) <= HALF


def test_scanned_gradients_weight_micro_batches_by_tokens():
    def masked_mean(params, batch):
        values, mask = batch
        return jnp.sum(params * values * mask) / jnp.sum(mask)

    # The third micro-batch has no tokens: its mean is 0/0.
    values, mask = jnp.arange(6.0), jnp.array([1.0, 1, 0, 0, 1, 0])
    tokens = lambda batch: jnp.sum(batch[1])
    found = micro_batch_value_and_grad(masked_mean, 3, tokens)(jnp.float32(1.0), (values, mask))
    expected = jax.value_and_grad(masked_mean)(jnp.float32(1.0), (values, mask))
    # A mean, its weight, their product and the sum.
    np.testing.assert_allclose(found, expected, rtol=4 * UNIT)


def test_scanned_gradients_of_bfloat16_parameters_are_summed_in_float32():
    loss = lambda p, batch: jnp.sum(p.astype(jnp.float32)[None] * batch)
    batch = jnp.array([[256.0], [1.0], [1.0], [-256.0]])
    _, grads = micro_batch_value_and_grad(loss, 4)(jnp.ones(1, jnp.bfloat16), batch)
    assert grads.dtype == jnp.bfloat16
    assert float(grads[0]) == 0.5


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="3 micro-batches do not divide a batch of 8"):
        micro_batch_value_and_grad(regression, 3)({"w": jnp.ones(3)}, regression_batch(8))
    with pytest.raises(ValueError, match="micro_batches must be at least 1"):
        micro_batch_value_and_grad(regression, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_sharded_parameters_keep_their_sharding(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rules = [("", "matrix")]
    tx = ravine.with_telemetry(ravine.accumulate(ravine.adamw(0.1), 2), rules)
    value = jnp.arange(32.0).reshape(8, 4) + 1

    def run(params, grads):
        state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(2):
            updates, state = step(grads, state, params)
        return updates, state

    with jax.set_mesh(mesh):
        params, grads = jax.device_put((value, value / 7), NamedSharding(mesh, P("data")))
        updates, state = run(params, grads)
    assert updates.sharding.is_equivalent_to(params.sharding, 2)
    if kind == AxisType.Explicit:  # `init` knows the shardings there
        assert state.inner.buffer.sharding.is_equivalent_to(params.sharding, 2)
    expected, plain = run(value, value / 7)
    assert furthest(updates, expected) <= HALF
    assert furthest(ravine.telemetry(state), ravine.telemetry(plain)) <= HALF
