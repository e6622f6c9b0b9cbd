"""Shampoo under faults: non-finite, singular, huge and tiny gradients, over many steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .preconditioned import (
    all_finite,
    assert_trees_close,
    factors,
    normal,
    refreshed_roots,
    run,
    shampoo,
)
from .roots import attainable

BLOCK = (slice(0, 4), slice(4, 8))  # block (0, 1) of an 8 x 8 leaf
AT = (0, 0, 1)  # the position of its factors


def others(x):
    """A stack `[1, 2, 2, ...]` without this block."""
    return jnp.concatenate([x[0, 0, :1], x[0, 1]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("b2", [1.0, 0.9])
def test_gradient_that_is_not_finite_stays_in_its_block(b2, bad):
    """This includes gradients whose squares are not finite.

    The statistics do not change, to the last bit. Roots of sums do not change either; roots of means are
    rescaled, because the weight that divides them counts the step.
    """
    clean = normal((8, 8), count=8)
    spoiled = [*clean[:4], clean[4].at[1, 6].set(bad), *clean[5:]]
    params = jnp.ones((8, 8))
    tx = optax.chain(
        shampoo(
            0.9,
            b2,
            refresh=ravine.Refresh(every=1),
            blocks=ravine.Blocks(size=4),
            graft=ravine.Grafting(b2=0.99),
        ),
        ravine.scale_by_learning_rate(0.01),
    )
    updates, states = run(tx, spoiled, params)
    assert all_finite(updates)
    # In float32 the second moments of a gradient of 1e30 are infinite, as in Adam itself.
    assert all_finite([state[0].factors for state in states] if bad == 1e30 else states)
    expected = run(tx, clean, params)[1]
    for before, after, should in zip(
        *(factors(s) for s in (states[3][0], states[4][0], expected[4][0])), strict=True
    ):
        np.testing.assert_array_equal(after.statistics[AT], before.statistics[AT])
        old, new = before.root[AT], after.root[AT]
        if b2 == 1:
            np.testing.assert_array_equal(new, old)
        else:
            # The same statistics with another bias correction.
            bound = 2 * attainable(float(before.condition[AT]), 4, n=4)
            new, old = (root / jnp.linalg.norm(root) for root in (new, old))
            assert_trees_close(new, old, bound)
        np.testing.assert_array_equal(others(after.root), others(should.root))
        np.testing.assert_array_equal(others(after.statistics), others(should.statistics))
        assert not np.any(after.refused)
    for last, before in zip(factors(states[-1][0]), factors(states[4][0]), strict=True):
        assert jnp.any(last.root[AT] != before.root[AT])


def spoil(state, value=math.nan):
    """Puts NaN into the statistics of the row factor of this block."""
    (rows, columns) = state.factors[0]
    statistics = rows.statistics.at[(*AT, 2, 2)].set(value)
    return state._replace(factors=((rows._replace(statistics=statistics), columns),))


@pytest.mark.parametrize("patience", [0, 2])
def test_spoiled_statistics_fall_back_to_the_graft_and_recover(patience):
    gradients = normal((8, 8), count=9)
    options = {"blocks": ravine.Blocks(size=4), "refresh": ravine.Refresh(every=1)}
    tx = shampoo(**options, roots=ravine.Roots(patience=patience))
    plain, _ = run(shampoo(**{**options, "refresh": ravine.Refresh(start=math.inf)}), gradients)
    healthy, _ = run(tx, gradients)
    step, state = jax.jit(tx.update), tx.init(gradients[0])
    for gradient in gradients[:3]:
        _, state = step(gradient, state)
    trusted = factors(state)[0].root[AT]
    state = spoil(state)
    for at in range(3, 7):
        update, new = step(gradients[at], state)
        assert all_finite(update)
        rows, columns = factors(new)
        refusals = at - 2
        np.testing.assert_array_equal(rows.root[AT], trusted)
        assert rows.residual[AT] == jnp.inf
        assert rows.failures[AT] == rows.refused[AT] == refusals
        assert jnp.sum(rows.refused) == refusals
        assert not np.any(columns.refused)
        assert jnp.all(refreshed_roots(state, new) == (np.arange(8) != 1))
        agrees = np.array_equal(update[BLOCK], plain[at][BLOCK])
        assert agrees == (refusals > patience)
        np.testing.assert_array_equal(update[4:], healthy[at][4:])
        state = new
    # The statistics are valid again: the next root is good, and the block is trusted.
    rows, columns = state.factors[0]
    rows = rows._replace(statistics=rows.statistics.at[AT].set(jnp.eye(4)))
    update, state = step(gradients[7], state._replace(factors=((rows, columns),)))
    assert factors(state)[0].failures[AT] == 0
    assert factors(state)[0].refused[AT] == 4
    assert jnp.any(factors(state)[0].root[AT] != trusted)
    assert not np.array_equal(update[BLOCK], plain[7][BLOCK])


def test_spoiled_statistics_need_a_refresh():
    """Otherwise nothing would reveal them, because blocks that still fit keep their roots."""
    gradient = normal((8, 8))
    refresh = ravine.Refresh(every=1, need=1e3)
    tx = shampoo(blocks=ravine.Blocks(size=4), refresh=refresh)
    step = jax.jit(tx.update)
    _, state = step(gradient, tx.init(gradient))
    assert not np.any([factor.refused for factor in factors(state)])
    for count in (1, 2):
        _, state = step(gradient, spoil(state))
        ((refused,),) = ravine.root_failures({"factors": {"kernel": state.factors}}).values()
        assert (refused.axis, refused.block) == (0, AT)
        assert refused.refused == refused.failures == count


@pytest.mark.parametrize("statistics", ["gram", "kl"])
@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad", "rmsprop", "adam", "sign"])
def test_zero_gradients_then_normal_ones(graft, statistics):
    gradients = [jnp.zeros((8, 8))] * 50 + normal((8, 8), count=8)
    tx = shampoo(
        refresh=ravine.Refresh(every=2),
        blocks=ravine.Blocks(size=4),
        graft=ravine.Grafting(step=graft),
        factors=ravine.Factors(statistics=statistics),
    )
    updates, states = run(tx, gradients)
    assert not np.any(jnp.stack(updates[:50]))
    assert all_finite(updates)
    assert all_finite(states)
    assert all(not np.any(f.refused) for f in factors(states[-1]))
    assert all(jnp.any(update != 0) for update in updates[50:])


@pytest.mark.parametrize("statistics", ["gram", "kl"])
@pytest.mark.parametrize("graft", ["none", "adam"])
def test_rank_one_gradients_forever(graft, statistics):
    vectors = normal((8, 1)), normal((1, 8), 1)
    gradients = [scale * vectors[0] * vectors[1] for scale in np.linspace(0.5, 1.5, 60)]
    tx = shampoo(
        refresh=ravine.Refresh(every=5),
        graft=ravine.Grafting(step=graft),
        factors=ravine.Factors(statistics=statistics),
    )
    updates, states = run(tx, gradients)
    assert all_finite(updates)
    assert all_finite(states)
    assert all(not np.any(f.refused) for f in factors(states[-1]))
    assert float(jnp.max(jnp.abs(updates[-1]))) < 10


@pytest.mark.parametrize("statistics", ["gram", "kl"])
@pytest.mark.parametrize("graft", ["none", "adam"])
def test_spike(graft, statistics):
    gradients = normal((8, 8), count=60)
    gradients[20] = 1e6 * gradients[20]
    tx = shampoo(
        refresh=ravine.Refresh(every=1),
        graft=ravine.Grafting(step=graft),
        factors=ravine.Factors(statistics=statistics),
    )
    updates, states = run(tx, gradients)
    assert all_finite(updates)
    assert all_finite(states)
    assert all(not np.any(f.failures) for f in factors(states[-1]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("graft", ["none", "adam"])
def test_scale_of_gradients(graft, scale, dtype):
    gradients = [g.astype(dtype) for g in normal((8, 12), count=60, scale=scale)]
    updates, states = run(
        shampoo(
            refresh=ravine.Refresh(every=5),
            blocks=ravine.Blocks(size=6),
            graft=ravine.Grafting(step=graft),
        ),
        gradients,
    )
    assert all(update.dtype == dtype for update in updates)
    assert all_finite(updates)
    assert all_finite(states)
    for factor in factors(states[-1]):
        assert not np.any(factor.failures)
        assert not np.any(factor.refused)
    if graft == "none":
        # From the start step on, the exponents add up to minus one, so the scale cancels.
        assert 1e-3 < float(jnp.max(jnp.abs(updates[-1]))) < 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_two_thousand_steps_at_any_scale(scale, dtype):
    """Least squares with a hidden layer and scaled gradients: nothing breaks or stays refused."""
    tx = optax.chain(
        shampoo(
            0.9,
            0.99,
            blocks=ravine.Blocks(size=8),
            refresh=ravine.Refresh(every=10),
            eps=1e-30,
        ),
        ravine.scale_by_learning_rate(1e-2),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": 0.3 * jax.random.normal(keys[0], (12, 16)),
        "second": 0.3 * jax.random.normal(keys[1], (16, 4)),
        "bias": jnp.zeros(4),
    }
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    hidden = jax.random.normal(keys[2], (12, 4))

    def loss(params, x):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        out = jnp.tanh(x @ params["first"]) @ params["second"] + params["bias"][None]
        return jnp.mean(jnp.square(out - x @ hidden))

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, jax.random.normal(key, (32, 12)))
        grads = jax.tree.map(lambda g: (scale * g.astype(jnp.float32)).astype(dtype), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    (params, state), losses = run((params, tx.init(params)), jax.random.split(keys[3], 2000))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, state, losses)))
    failures = [factor.failures for factor in factors(state)]
    assert len(failures) == 5
    assert not any(np.any(x) for x in failures)
    assert losses[-100:].mean() < 0.5 * losses[:10].mean()
