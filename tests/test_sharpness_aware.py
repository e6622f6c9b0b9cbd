"""Any optimizer inside of `optax.contrib.sam`, which mixes states by arithmetic."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
import ravine

from .optimizers_table import builder
from .tolerances import HALF, double, furthest

PARAMS = {
    "up": {"kernel": jnp.linspace(-1.0, 1.0, 24).reshape(4, 6), "bias": jnp.zeros(6)},
    "norm": {"scale": jnp.ones(4)},
}
# Sophia needs a curvature, which `sam` does not pass on.
NAMES = [name for name in ravine.names() if not name.startswith("sophia")]


def sharpness_aware(tx):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(tx, adversary)


@pytest.fixture(autouse=True)
def mixed():
    """`sam` multiplies booleans by floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_the_state_keeps_its_dtypes(name):
    tx = sharpness_aware(builder(name)(1e-2, **decayed(name)))
    before = jax.eval_shape(tx.init, PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, before, PARAMS)
    kinds = lambda state: [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert kinds(after) == kinds(before)


def decayed(name):
    return {"weight_decay": 0.1} if ravine.OptimizerConfig(name).accepts("weight_decay") else {}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["soap", "muon"])
def test_steps_are_those_at_the_adversarial_points(name):
    tx = builder(name)(1e-2, weight_decay=0.1)
    both = sharpness_aware(tx)
    loss = lambda p: jnp.sum((p["up"]["kernel"].T @ p["norm"]["scale"] + p["up"]["bias"] - 1) ** 2)

    def body(carry, _):
        params, state = carry
        updates, state = both.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = double(PARAMS)
    (found, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=8))(
        (start, both.init(start))
    )
    params, state = start, tx.init(start)
    update = jax.jit(tx.update)
    for _ in range(4):
        grads = jax.grad(loss)(params)
        norm = optax.tree.norm(grads)
        away = jax.tree.map(lambda p, g, norm=norm: p + 0.05 * g / norm, params, grads)
        updates, state = update(jax.grad(loss)(away), state, params)
        params = optax.apply_updates(params, updates)
    assert furthest(found, params) <= HALF
