"""Shampoo's update: what it must equal, and its axes, exponents and statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.matrix.algebra.roots import PseudoInverse

from .arrays import single
from .preconditioned import all_finite, conditioned, factors, normal, run
from .tolerances import HALF, double, furthest

RATE = 0.01


def one_step(gradient, **options):
    plain = {"refresh": {"every": 1}, "roots": {"ridge": 0.0}, "graft": {"step": "none"}}
    options = {**plain, **options}
    tx = ravine.scale_by_shampoo(0.0, 1.0, **options)
    return run(tx, [jnp.asarray(gradient, float)])[0][0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_first_step_is_the_polar_factor(ridge):
    gradient = 3 * conditioned(6, 0)
    left, _, right = np.linalg.svd(gradient)
    # The ridge adds 1e-9 times the squared condition number, 16, halved, for the smallest value.
    assert furthest(one_step(gradient, roots=ravine.Roots(ridge=ridge)), left @ right) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("sides", "shape"), [("rows", (4, 7)), ("columns", (7, 4)), ("smaller", (4, 7))]
)
def test_first_one_sided_step_is_the_polar_factor(sides, shape):
    gradient = normal(shape)
    left, _, right = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    found = one_step(gradient, blocks=ravine.Blocks(sides=sides))
    assert furthest(found, left @ right) <= HALF


@pytest.mark.usefixtures("float64")
def test_first_step_of_a_vector_is_its_unit_vector():
    gradient = double(5 * normal((9,)))
    found = one_step(gradient, roots=ravine.Roots(method=PseudoInverse(), ridge=0.0))
    assert furthest(found, gradient / jnp.linalg.norm(gradient)) <= HALF


@pytest.mark.usefixtures("float64")
def test_one_by_one_block_and_scalar():
    """A matrix with one element becomes its sign; a scalar has no factor and does not change."""
    assert furthest(one_step([[-7.0]]), np.array([[-1.0]])) <= HALF
    assert one_step(-7.0) == -7


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("graft", ["none", "sgd"])
def test_rotated_gradients_have_rotated_updates(graft):
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(8, 8)))[0] for s in (1, 2))
    gradients = [conditioned(8, seed) for seed in range(6)]
    rotated = [left @ g @ right.T for g in gradients]
    tx = ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2), graft=ravine.Grafting(step=graft))
    plain, turned = (run(tx, grads)[0] for grads in (gradients, rotated))
    assert furthest(turned, [left @ np.asarray(update) @ right.T for update in plain]) <= HALF


def reference(gradients, b1, b2, ridge, factored=None):
    """Shampoo in float64, without graft and with new roots at every step."""
    order = gradients[0].ndim
    factored = range(order) if factored is None else factored
    statistics: dict[int, Any] = dict.fromkeys(factored, 0.0)
    mu, updates = 0.0, []
    for step, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient, np.float64)
        mu = b1 * mu + (1 - b1) * g
        update = mu / (1 - b1**step)
        for axis in factored:
            others = [other for other in range(order) if other != axis]
            gram = np.tensordot(g, g, (others, others))
            weight = 1 if b2 == 1 else 1 - b2
            statistics[axis] = b2 * statistics[axis] + weight * gram
            corrected = statistics[axis] / (1 if b2 == 1 else 1 - b2**step)
            values, vectors = np.linalg.eigh(corrected)
            values = values + ridge * values[-1]
            root = (vectors * values ** (-1 / (2 * len(factored)))) @ vectors.T
            update = np.moveaxis(np.tensordot(root, update, (1, axis)), 0, axis)
        updates.append(update)
    return updates


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("b2", [0.9, 1.0])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 4, 2), (2, 3, 2, 3)], ids=str)
def test_three_steps_in_double_precision(shape, b2):
    gradients = double(normal(shape, count=3))
    tx = ravine.scale_by_shampoo(
        0.8, b2, refresh=ravine.Refresh(every=1), graft=ravine.Grafting(step="none")
    )
    updates, states = run(tx, gradients)
    assert len(factors(states[-1])) == len(shape)
    assert furthest(updates, reference(gradients, 0.8, b2, 1e-5)) <= HALF


@pytest.mark.usefixtures("float64")
def test_axis_over_the_limit_has_no_factor():
    gradients = double(normal((40, 4), count=3))
    tx = ravine.scale_by_shampoo(
        0.8,
        0.9,
        refresh=ravine.Refresh(every=1),
        blocks=ravine.Blocks(size=16, bound=16),
        graft=ravine.Grafting(step="none"),
    )
    updates, states = run(tx, gradients)
    rows, columns = states[-1].factors[0]
    assert rows is None
    assert columns.root.shape == (1, 1, 1, 4, 4)
    assert furthest(updates, reference(gradients, 0.8, 0.9, 1e-5, factored=[1])) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("sides", "factored"), [("rows", [0]), ("columns", [1]), ("smaller", [1])])
def test_one_sided(sides, factored):
    gradients = double(normal((6, 4), count=3))
    tx = ravine.scale_by_shampoo(
        0.8,
        0.9,
        refresh=ravine.Refresh(every=1),
        blocks=ravine.Blocks(sides=sides),
        graft=ravine.Grafting(step="none"),
    )
    updates, states = run(tx, gradients)
    present = [at for at, factor in enumerate(states[-1].factors[0]) if factor is not None]
    assert present == factored
    assert furthest(updates, reference(gradients, 0.8, 0.9, 1e-5, factored=factored)) <= HALF


@pytest.mark.usefixtures("float64")
def test_the_exponent_given_is_used():
    gradient = conditioned(5, 0)
    left, sizes, right = np.linalg.svd(gradient)
    found = one_step(gradient, roots=ravine.Roots(exponent=-1 / 8, ridge=0.0))
    assert furthest(found, (left * sizes**0.5) @ right) <= HALF


@pytest.mark.usefixtures("float64")
def test_kl_statistics():
    """They equal those of the Gram matrices at the first step, and differ once there are roots."""
    gradients = double(normal((6, 8), count=12))
    gram, kl = (
        run(
            ravine.scale_by_shampoo(
                refresh=ravine.Refresh(every=2), factors=ravine.Factors(statistics=name)
            ),
            gradients,
        )
        for name in ("gram", "kl")
    )
    assert all_finite(kl)
    assert furthest(kl[0][2], gram[0][2]) <= HALF
    assert jnp.max(jnp.abs(kl[0][-1] - gram[0][-1])) > 1e-2
    assert all(not np.any(f.refused) for f in factors(kl[1][-1]))


@pytest.mark.usefixtures("float64")
def test_kl_statistics_of_the_second_step():
    gradients = double(normal((3, 4), count=2))
    tx = ravine.scale_by_shampoo(
        0.0,
        0.9,
        refresh=ravine.Refresh(every=1),
        factors=ravine.Factors(statistics="kl"),
        graft=ravine.Grafting(step="none"),
    )
    _, states = run(tx, gradients)
    first, second = (factors(state) for state in states)
    g = np.asarray(gradients[1], np.float64)
    rows, columns = (np.asarray(f.root[0, 0, 0], np.float64) for f in first)
    expected = [g @ columns @ columns @ g.T, g.T @ rows @ rows @ g]
    for old, new, gram in zip(first, second, expected, strict=True):
        mixed = 0.9 * np.asarray(old.statistics[0, 0, 0]) + 0.1 * gram
        assert furthest(new.statistics[0, 0, 0], mixed) <= HALF


@pytest.mark.usefixtures("float64")
def test_shampoo_leaves_vectors_to_the_fallback():
    params = double({"dense": {"kernel": normal((6, 4)), "bias": normal((4,), 1)}})
    gradients = [jax.tree.map(lambda x, s=s: jnp.cos(s * x), params) for s in range(1, 6)]
    found, _ = run(
        ravine.shampoo(RATE, refresh=ravine.Refresh(every=2), weight_decay=0.1), gradients, params
    )
    kernels = [g["dense"]["kernel"] for g in gradients]
    tx = optax.chain(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2)),
        ravine.add_decayed_weights(0.1),
        ravine.scale_by_learning_rate(RATE),
    )
    expected, _ = run(tx, kernels, params["dense"]["kernel"])
    assert furthest([update["dense"]["kernel"] for update in found], expected) <= HALF
    biases = [g["dense"]["bias"] for g in gradients]
    adamw, _ = run(ravine.adamw(RATE, b2=0.95, weight_decay=0.1), biases, params["dense"]["bias"])
    assert furthest([update["dense"]["bias"] for update in found], adamw) <= HALF


@pytest.mark.slow
@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("statistics", ["gram", "kl"])
def test_shampoo_solves_a_badly_conditioned_least_squares_problem(statistics, staggered):
    """min |A (W - W*) B|^2 with condition number 100 for both factors, where Adam is far behind."""
    a, b = (single(conditioned(16, seed, 0.1, 10.0)) for seed in (1, 2))
    target = normal((16, 16), 3)

    def loss(w):
        return jnp.mean(jnp.square(a @ (w - target) @ b))

    def final(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros((16, 16))
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, length=2000)
        return float(loss(w))

    rate = optax.linear_schedule(0.03, 0.0, 2000)
    direction = ravine.scale_by_shampoo(
        refresh=ravine.Refresh(every=5, staggered=staggered), factors={"statistics": statistics}
    )
    ours = optax.chain(direction, ravine.scale_by_learning_rate(rate))
    assert final(ours) < 0.2 * final(ravine.adam(rate, 0.9, 0.99))
