"""Statistics that learn from every k-th gradient: their values, and what does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.training.plan.flops import arithmetic

from .preconditioned import run
from .tolerances import HALF, furthest, without_residuals

COUNT = 9


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def correlated(count=COUNT, seed=0, shape=(8, 6)):
    """Gradients that are mostly equal to the previous one, with power-law singular values."""
    rng = np.random.default_rng(seed)
    rows, columns = ((1 + np.arange(n)) ** -0.75 for n in shape)
    fresh = rng.normal(size=(count, *shape)) * rows[:, None] * columns
    found = [fresh[0]]
    for new in fresh[1:]:
        found.append(0.8 * found[-1] + 0.6 * new)
    return [jnp.asarray(gradient) for gradient in found]


def mean(gradients, b2, every):
    """The weighted mean of Gram matrices of the first and every k-th gradient."""
    total = np.zeros((8, 8))
    for g in gradients:
        gram = np.float64(g) @ np.float64(g).T
        total = total + every * gram if b2 == 1 else b2**every * total + (1 - b2**every) * gram
    return total


@pytest.mark.parametrize("b2", [0.9, 1.0])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_shampoo_learns_from_the_first_gradient_and_every_kth(every, b2):
    gradients = correlated()
    refresh = ravine.Refresh(every=4, statistics_every=every)
    _, states = run(
        ravine.scale_by_shampoo(b2=b2, refresh=refresh, graft={"step": "none"}), gradients
    )
    for at, state in enumerate(states, 1):
        seen = [g for t, g in enumerate(gradients[:at], 1) if t == 1 or t % every == 0]
        expected = mean(seen, b2, every)
        found = state.factors[0][0].statistics.squeeze()
        assert furthest(found, expected) <= HALF


@pytest.mark.parametrize("every", [1, 3])
def test_soap_learns_from_the_first_step_and_every_kth(every):
    gradients = correlated()
    refresh = ravine.Refresh(every=3, statistics_every=every)
    _, states = run(ravine.scale_by_soap(b2=0.9, refresh=refresh), gradients)
    for at, state in enumerate(states):
        expected = mean(gradients[: at + 1 : every], 0.9, every)
        found = state.bases[0][0].statistics.squeeze()
        assert furthest(found, expected) <= HALF


def test_soap_keeps_its_moments_every_step():
    """Until the first refresh, its bases are those of the first gradient, and so are its updates."""
    gradients = correlated()
    found = [
        run(ravine.scale_by_soap(refresh=ravine.Refresh(every=20, statistics_every=k)), gradients)[
            0
        ]
        for k in (1, 20)
    ]
    assert furthest(*found) <= HALF


def test_kl_shampoo_learns_from_the_first_gradient_and_every_kth():
    """If each gradient repeats k times, the result is that of each one once, apart from the rates."""
    gradients = correlated(4)
    rare = ravine.Refresh(every=3, statistics_every=3)
    repeated = [g for g in gradients for _ in range(3)]
    _, thrice = run(ravine.scale_by_kl_shampoo(b2=0.9, refresh=rare), repeated)
    once = ravine.scale_by_kl_shampoo(b2=0.9**3, refresh=ravine.Refresh(every=1))
    _, states = run(once, gradients)
    for a, b in zip(thrice[::3], states, strict=True):
        assert furthest(*map(without_residuals, (a.factors, b.factors))) <= HALF


@pytest.mark.parametrize("staggered", [False, True])
def test_the_start_is_corrected_exactly(staggered):
    """A constant gradient has one root, however often the statistics learn from it."""
    gradients = correlated(1) * 6
    roots = []
    for k in (1, 3):
        refresh = ravine.Refresh(every=3, staggered=staggered, statistics_every=k)
        tx = ravine.scale_by_shampoo(b2=0.9, refresh=refresh, roots={"ridge": 1e-2})
        roots.append([factor.root for factor in run(tx, gradients)[1][2].factors[0]])
    assert furthest(*roots) <= HALF


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo", "soap_muon"])
def test_registry_explanation_and_planner_know_it(name):
    config = ravine.OptimizerConfig(name, {"refresh": {"statistics_every": 5}})
    assert ravine.OptimizerConfig.from_json(config.to_json()) == config
    params = {"kernel": jnp.ones((64, 32))}
    rules = (("", "matrix"),)

    def planned(refresh):
        tx = ravine.OptimizerConfig(name, {"refresh": refresh}).build(1e-3, rules=rules)
        state = jax.eval_shape(tx.init, params)
        return arithmetic(jax.jit(tx.update).trace(params, state, params), devices=1)

    (row,) = ravine.explain(config.build(1e-3, rules=rules), params).rows
    assert row.how.startswith("1 block of 64x32, factors of 64, 32, statistics every 5")
    plain, rare = planned({}), planned({"statistics_every": 5})
    grams = 2 * 64 * 32 * (64 + 32)
    assert plain.always - rare.always >= grams
    assert rare.sometimes - plain.sometimes >= grams
