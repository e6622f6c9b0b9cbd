"""Telemetry: correct numbers, a constant structure, readable from Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx

from .tolerances import UNIT

RULES = [("kernel$", "matrix"), ("bias$", "bias")]
PARAMS = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((4,), 2.0)}


def test_numbers_by_hand():
    tx = ravine.with_telemetry(ravine.sgd(lambda count: jnp.where(count == 0, 0.5, 0.25)), RULES)
    grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.full((4,), 4.0)}
    state = tx.init(PARAMS)
    assert float(ravine.telemetry(state)["learning_rate"]) == 0.5
    for rate in (0.5, 0.25):
        _, state = tx.update(grads, state, PARAMS)
        found = {name: float(value) for name, value in ravine.telemetry(state).items()}
        assert found == pytest.approx(
            {
                "learning_rate": rate,
                "gradient_norm": 68.0**0.5,
                "gradient_norm/matrix": 2.0,
                "gradient_rms/matrix": 1.0,
                "update_norm/matrix": 2.0 * rate,
                "update_rms/matrix": rate,
                "parameter_norm/matrix": 6.0,
                "parameter_rms/matrix": 3.0,
                "gradient_norm/bias": 8.0,
                "gradient_rms/bias": 4.0,
                "update_norm/bias": 8.0 * rate,
                "update_rms/bias": 4.0 * rate,
                "parameter_norm/bias": 4.0,
                "parameter_rms/bias": 2.0,
            }
        )


def test_updates_are_those_without_telemetry_and_the_state_can_be_scanned():
    plain, tx = ravine.muon(0.1), ravine.with_telemetry(ravine.muon(0.1))
    grads = jax.tree.map(jnp.ones_like, PARAMS)

    def step(tx):
        def body(state, _):
            updates, state = tx.update(grads, state, PARAMS)
            return state, updates

        return jax.jit(lambda: jax.lax.scan(body, tx.init(PARAMS), length=3))()

    state, updates = step(tx)
    jax.tree.map(np.testing.assert_array_equal, updates, step(plain)[1])
    found = ravine.telemetry(state)
    np.testing.assert_allclose(found["learning_rate/muon"], 0.1)
    np.testing.assert_allclose(found["learning_rate/fallback"], 0.1 * 0.015)
    assert {name.partition("/")[2] for name in found if "rms" in name} == {"matrix", "bias"}
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)


def test_norms_of_bfloat16_gradients_are_float32():
    tx = ravine.with_telemetry(ravine.sgd(1.0), [("", "matrix")])
    params = jnp.ones(10_000, jnp.bfloat16)
    _, state = tx.update(params, tx.init(params), params)
    norm = ravine.telemetry(state)["gradient_norm/matrix"]
    assert norm.dtype == jnp.float32
    assert float(norm) == 100.0  # exact: whole numbers


def test_nan_shows_in_its_role_only():
    tx = ravine.with_telemetry(ravine.sgd(1.0))
    grads = {"kernel": jnp.full((2, 2), jnp.nan), "bias": jnp.ones(4)}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    found = ravine.telemetry(state)
    assert jnp.isnan(found["gradient_norm/matrix"])
    assert float(found["gradient_norm/bias"]) == 2.0
    np.testing.assert_array_equal(updates["bias"], -1.0)


def test_readable_from_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1e9), ravine.with_telemetry(ravine.adamw(0.25)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    found = ravine.telemetry(optimizer.opt_state)
    assert float(found["learning_rate"]) == 0.25
    np.testing.assert_allclose(
        found["gradient_norm/matrix"], 6**0.5, rtol=2 * UNIT
    )  # the root of a whole number


def test_a_parameter_that_no_rule_covers_is_watched_as_other():
    params = {"strange": jnp.full(2, 3.0), "kernel": jnp.full((2, 2), 2.0)}
    tx = ravine.with_telemetry(ravine.adamw(1.0))
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    found = ravine.telemetry(after)
    np.testing.assert_allclose(found["gradient_norm/other"], 18**0.5, rtol=2 * UNIT)
    np.testing.assert_allclose(found["gradient_norm"], 34**0.5, rtol=2 * UNIT)


def test_faults():
    with pytest.raises(ValueError, match="holds 0 with_telemetry"):
        ravine.telemetry(ravine.sgd(1.0).init(PARAMS))
    with pytest.raises(ValueError, match="'martix', which is no role; did you mean matrix"):
        ravine.with_telemetry(ravine.sgd(1.0), [("kernel$", "martix")])
    tx = ravine.with_telemetry(ravine.sgd(1.0))
    with pytest.raises(ValueError, match="with_telemetry needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
