"""Schedule-Free: how its state is found, what it averages, and its dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx

from .tolerances import UNIT, furthest


def run(tx, params, grads, steps):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
        lambda tx: ravine.accumulate(tx, 1),
        lambda tx: ravine.with_telemetry(tx, [("", "matrix")]),
        lambda tx: optax.partition({"w": tx, "b": tx}, {"w": "w", "b": "b"}),
    ],
    ids=["bare", "chain", "accumulate", "telemetry", "partition"],
)
def test_the_average_is_found_however_deep(wrap):
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    grads = {"w": jnp.array([1.0, -1.0]), "b": jnp.array([2.0])}
    params, state = run(wrap(ravine.schedule_free_sgd(0.1)), params, grads, 3)
    found = ravine.schedule_free_eval_params(state, params)
    # z is 1, 2 and 3 steps of 0.1 g away; with equal weights their mean is 2 steps. Each of the three
    # steps has one rounding in z and three in the average.
    np.testing.assert_allclose(found["w"], [0.8, 2.2], rtol=12 * UNIT)
    np.testing.assert_allclose(found["b"], [2.6], rtol=12 * UNIT)
    np.testing.assert_allclose(
        params["w"], [0.9 * 0.8 + 0.1 * 0.7, 0.9 * 2.2 + 0.1 * 2.3], rtol=16 * UNIT
    )


def test_parameters_outside_a_mask_are_evaluated_as_they_are():
    tx = optax.masked(ravine.schedule_free_sgd(0.1), {"w": True, "b": False})
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    found = ravine.schedule_free_eval_params(tx.init(params), {"w": params["w"], "b": jnp.zeros(1)})
    assert float(found["b"][0]) == 0.0


def test_a_state_without_schedule_free_is_refused():
    with pytest.raises(ValueError, match="no schedule_free"):
        ravine.schedule_free_eval_params(ravine.adam(1e-3).init(jnp.zeros(1)), jnp.zeros(1))


def test_the_average_of_bfloat16_parameters_goes_on():
    """In bfloat16, a sum of equal weights (as in optax 0.2.8) stops growing after 256 of them."""
    steps = 600
    grads = jnp.array([1.0], jnp.bfloat16)
    params = jnp.zeros(1, jnp.bfloat16)
    _, state = run(ravine.schedule_free_sgd(1.0, b1=0.0), params, grads, steps)
    assert state.weight_sum == steps
    # The average is rounded once per step.
    np.testing.assert_allclose(state.x, -(steps + 1) / 2, rtol=steps * UNIT)


def test_polynomial_weights_and_a_learning_rate_of_zero():
    tx = ravine.schedule_free_sgd(lambda count: jnp.where(count == 0, 0.0, 1.0), weight_power=1.0)
    _, state = run(tx, jnp.zeros(1), jnp.ones(1), 3)
    # z is 0, -1, -2 with weights 0, 2, 3.
    np.testing.assert_allclose(state.x, [-(2 * 1 + 3 * 2) / 5], rtol=4 * UNIT)


def test_muon_may_be_the_base():
    base = ravine.muon(0.02, b1=0.0, rules=[("", "matrix")])
    tx = ravine.schedule_free(base, 0.02)
    params = {"kernel": jnp.ones((4, 3))}
    params, state = run(tx, params, {"kernel": jnp.eye(4, 3)}, 2)
    assert jnp.all(jnp.isfinite(ravine.schedule_free_eval_params(state, params)["kernel"]))


@pytest.mark.parametrize("jitted", [False, True])
def test_flax_models_are_evaluated_at_the_average(jitted):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plain = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = optax.chain(optax.clip(1.0), ravine.schedule_free_sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model))

    step = nnx.jit(step) if jitted else step
    for _ in range(3):
        step(model, optimizer)
    graphdef = nnx.graphdef(model)
    loss = lambda p: jnp.sum(nnx.merge(graphdef, p)(jnp.ones((1, 2))) ** 2)
    state, params = tx.init(plain), plain
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    average = ravine.schedule_free_eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    nnx.update(model, average)
    expected = ravine.schedule_free_eval_params(state, params)
    found = nnx.as_pure(nnx.state(model, nnx.Param))
    # Ten roundings in each of three steps, which clipped gradients do not magnify.
    assert furthest(found, expected) <= 30 * UNIT


def test_parameters_of_another_model_are_refused():
    state = ravine.schedule_free_sgd(0.5).init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"average of \['a'\], which is not in params"):
        ravine.schedule_free_eval_params(state, {"b": jnp.ones(2)})
