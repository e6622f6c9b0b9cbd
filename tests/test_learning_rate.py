"""The learning rate in the state is the one that was used, and its clock never stops."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine import schedules as s

from .tolerances import UNIT

PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
GRADS = {"kernel": jnp.eye(4, 3), "bias": jnp.arange(3.0)}


def steps(tx, state, number):
    """The sizes of the updates of the bias, and the state after that many updates."""
    seen, update = [], jax.jit(tx.update)
    for _ in range(number):
        updates, state = update(GRADS, state, PARAMS)
        seen.append(float(-updates["bias"][1]))
    return seen, state


def clocks(state):
    return [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]


def test_a_schedule_takes_over_a_run_at_a_constant_rate():
    decay = lambda count: 1.0 / (1.0 + jnp.asarray(count, jnp.float32))
    build = lambda rate: ravine.adamw(rate, weight_decay=decay)
    constant = build(0.1)
    _, state = steps(constant, constant.init(PARAMS), 10)
    branch = build(s.anneal_from(s.constant(0.1), 10, 4, "linear"))
    rates = []
    for _ in range(3):
        _, state = steps(branch, state, 1)
        rates.append(float(optax.tree.get(state, "learning_rate")))
    assert clocks(state) == [13, 13, 13]
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05], rtol=4 * UNIT)


@pytest.mark.parametrize("decay", [0.1, lambda count: 0.1])
def test_every_clock_advances_whatever_the_decay_is(decay):
    for form in ("coupled", "adamc", "proximal"):
        tx = ravine.adamw(0.1, weight_decay=decay, weight_decay_form=form)
        assert clocks(steps(tx, tx.init(PARAMS), 2)[1]) == [2, 2, 2]


def test_the_rate_that_is_set_is_used_until_it_is_set_again():
    tx = ravine.sgd(lambda count: 0.5 / (1.0 + jnp.asarray(count, jnp.float32)))
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    sizes, expected = [], [0.5, 0.25, 0.125, 0.125, 0.1]
    for step, _ in enumerate(expected):
        if step == 2:
            state = optax.tree.set(state, learning_rate=0.125)
        if step == 4:  # back to the schedule
            state = optax.tree.set(state, learning_rate=optax.tree.get(state, "scheduled"))
        updates, state = update(GRADS, state, PARAMS)
        sizes.append(float(-updates["bias"][1]))
        assert float(optax.tree.get(state, "learning_rate")) == sizes[-1]
    np.testing.assert_allclose(sizes, expected, rtol=2 * UNIT)  # a quotient, and 0.1 itself


def test_a_nan_learning_rate_does_not_persist():
    tx = ravine.sgd(lambda count: jnp.where(count == 1, jnp.nan, 0.5))
    seen, _ = steps(tx, tx.init(PARAMS), 4)
    np.testing.assert_array_equal(seen, [0.5, np.nan, 0.5, 0.5])


def test_a_chain_with_a_fallback_has_one_learning_rate():
    tx = ravine.with_telemetry(
        ravine.muon(0.1, fallback=ravine.Fallback(learning_rate=0.01), weight_decay=0.0)
    )
    state = tx.init(PARAMS)
    seen, state = steps(tx, state, 1)
    assert float(optax.tree.get(state, "learning_rate")) == np.float32(0.1)
    assert float(optax.tree.get(state, "fallback_learning_rate")) == np.float32(0.01)
    np.testing.assert_allclose(seen, 0.01, rtol=8 * UNIT)  # two moments, their root and quotient
    state = optax.tree.set(state, learning_rate=0.3, fallback_learning_rate=0.03)
    seen, state = steps(tx, state, 1)
    # Also the roundings of 1 - 0.9^2 and 1 - 0.95^2, 5 and 10 units, of which the root passes on half.
    np.testing.assert_allclose(seen, 0.03, rtol=18 * UNIT)
    found = ravine.telemetry(state)
    assert float(found["learning_rate/muon"]) == np.float32(0.3)
    assert float(found["learning_rate/fallback"]) == np.float32(0.03)


def test_a_fallback_without_parameters_rests():
    """Its count and rate stay as they are; with a parameter of its own they follow the schedule."""
    tx = ravine.muon(s.linear(0.1, 4))
    for rests in (True, False):
        params = {"kernel": jnp.ones((2, 3))} | ({} if rests else {"bias": jnp.ones(3)})
        first = tx.init(params)
        _, state = jax.jit(tx.update)(params, first, params)
        _, state = jax.jit(tx.update)(params, state, params)
        before = optax.tree.get(first, "fallback_learning_rate")
        after = optax.tree.get(state, "fallback_learning_rate")
        assert bool(before == after) == rests
        assert float(optax.tree.get(state, "learning_rate")) == np.float32(0.075)


def test_a_fallback_follows_the_schedule_at_its_ratio():
    for build, ratio in ((ravine.muon, 0.015), (ravine.adamuon, 1.0)):
        state = build(s.linear(0.1, 4)).init(PARAMS)
        found = (optax.tree.get(state, f"{name}learning_rate") for name in ("", "fallback_"))
        np.testing.assert_allclose(list(found), [0.1, 0.1 * ratio], rtol=2 * UNIT)


def test_telemetry_follows_a_schedule_that_was_replaced():
    before, after = (ravine.with_telemetry(ravine.sgd(rate)) for rate in (s.constant(0.5), 0.25))
    state = steps(before, before.init(PARAMS), 2)[1]
    seen, state = steps(after, state, 1)
    assert seen == [0.25]
    assert float(ravine.telemetry(state)["learning_rate"]) == 0.25


def test_an_injected_rate_is_found_once_and_can_be_set():
    tx = ravine.inject_hyperparams(ravine.adamw)(0.5, weight_decay=0.0)
    state = tx.init(PARAMS)
    assert float(optax.tree.get(state, "learning_rate")) == 0.5
    state = optax.tree.set(state, learning_rate=jnp.float32(0.25))
    seen, _ = steps(tx, state, 1)
    np.testing.assert_allclose(seen, 0.25, rtol=8 * UNIT)  # two moments, their root and quotient


def test_schedule_free_weights_by_the_rate_that_was_used():
    tx = ravine.schedule_free_sgd(1.0)
    state = optax.tree.set(tx.init(PARAMS), learning_rate=3.0)
    assert float(steps(tx, state, 1)[1].peak) == 3.0


@pytest.mark.parametrize("name", ["shampoo", "soap", "soap_muon", "kl_shampoo"])
def test_integers_may_come_from_numpy_and_options_stay_as_given(name):
    builder, rules = getattr(ravine, name), {"rules": [("", "matrix")]}
    params = {"kernel": jnp.ones((4, 3))}
    given = builder(1e-3, refresh=ravine.Refresh(every=np.int64(20)), **rules)
    known = builder(1e-3, refresh=ravine.Refresh(every=20), **rules)
    assert jax.eval_shape(given.init, params) == jax.eval_shape(known.init, params)
    jax.eval_shape(optax.inject_hyperparams(builder)(1e-3, **rules).init, params)
    with pytest.raises(ValueError, match=r"must be known when.*ravine\.inject_hyperparams"):
        jax.eval_shape(lambda every: ravine.Refresh(every=every), jnp.int32(2))
    state = jax.eval_shape(ravine.inject_hyperparams(builder)(1e-3, **rules).init, params)
    assert {"learning_rate", "b1", "b2", "weight_decay"} <= state.hyperparams.keys()
    assert (
        not {"refresh", "blocks", "fallback", "roots", "factors", "graft", "seed"}
        & state.hyperparams.keys()
    )


@pytest.mark.parametrize("name", ravine.names())
def test_every_optimizer_takes_injected_hyperparameters(name):
    """A rate that is set directly and a schedule both take effect under tracing, for every optimizer."""
    builder = getattr(ravine, name)
    rules = {"rules": [("", "matrix")]} if "rules" in inspect.signature(builder).parameters else {}
    decay = {"weight_decay": s.linear(0.1, 10)}
    decay = decay if "weight_decay" in inspect.signature(builder).parameters else {}
    tx = ravine.inject_hyperparams(builder)(0.5, **decay, **rules)
    extra = {"curvature": lambda params, key: params} if "sophia" in name else {}
    params = {"kernel": jnp.ones((4, 3))}
    state = tx.init(params)
    assert float(optax.tree.get(state, "learning_rate")) == 0.5
    update = lambda state: tx.update(params, state, params, **extra)[1]
    state = optax.tree.set(state, learning_rate=jnp.float32(0.25))
    assert jax.tree.structure(jax.eval_shape(update, state)) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "None"), (jnp.array([0.1]), r"an array of shape \(1,\)")]
)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_that_returns_no_number_is_refused(name, value, got):
    tx = ravine.adamw(**{"learning_rate": 0.1, name: lambda count: value})
    with pytest.raises(ValueError, match=f"a schedule must return a number .* got {got}"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
