"""Monitors and weight constraints: what they report and preserve, checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx
from ravine.stability import (
    keep_unit_norm,
    logit_statistics,
    monitored,
    sigma_reparam,
    sigma_weights,
    unit_norm,
    with_monitors,
)

from .test_losses import assert_gradient
from .tolerances import UNIT

RULES = [("kernel$", "matrix"), ("bias$", "bias")]


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"layers": {"kernel": (3, 6, 4)}, "kernel": (5, 4), "bias": (7,)}
    make = lambda shape: jnp.array(np.float32(rng.normal(size=shape)))
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def effective_rank(m):
    s = np.linalg.svd(np.asarray(m, np.float64), compute_uv=False)
    return np.sum(s**2) ** 2 / np.sum(s**4)


def test_metrics_by_hand_and_updates_untouched():
    params, grads = tree(0), tree(1)
    plain = ravine.adam(1e-2, b1=0.5, b2=0.75)
    limit = 0.1  # ten times eps
    tx = with_monitors(plain, RULES, every=1, eps=limit / 10, measured=["max_logit"])
    state = tx.init(params)
    measured = {"max_logit": jnp.float32(7)}
    update = jax.jit(tx.update, donate_argnums=1)
    updates, state = update(grads, state, params, loss=2.0, measured=measured)
    expected, inner = jax.jit(plain.update)(grads, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner, inner)

    found = monitored(state)
    matrices = lambda t: np.concatenate(
        [np.float64(x).ravel() for x in (t["kernel"], t["layers"]["kernel"])]
    )
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
    # Roots of sums of 92 and of 7 squares: half as many roundings, and two more.
    norm = np.linalg.norm(matrices(grads))
    assert found["gradient_norm/matrix"] == pytest.approx(norm, rel=48 * UNIT)
    assert found["parameter_rms/bias"] == pytest.approx(rms(params["bias"]), rel=6 * UNIT)
    ratio = rms(matrices(updates)) / rms(matrices(params))
    assert found["update_ratio/matrix"] == pytest.approx(ratio, rel=2 * 48 * UNIT)
    share = np.mean(np.sqrt(0.25 * np.square(matrices(grads))) < limit)
    assert found["eps_share/matrix"] == pytest.approx(share, rel=2 * UNIT)
    assert 0 < share < 1
    ranks = [effective_rank(m) for m in (grads["kernel"], *grads["layers"]["kernel"])]
    # Squared sums of 20 squares, over sums of 16 squares of sums of 5 products: 40 + 16 + 4 * 10.
    assert found["momentum_rank/matrix"] == pytest.approx(np.mean(ranks), rel=96 * UNIT)
    assert found["max_logit"] == 7


def test_samples_every_few_steps_and_scores_spikes():
    params, grads = tree(0), tree(1)
    tx = with_monitors(ravine.sgd(0.1), [("", "matrix")], every=3, window=4)
    rng = np.random.default_rng(0)
    losses = 1 + 0.01 * rng.normal(size=20)
    losses[[10, 17]] = 3.0
    losses[12] = np.nan

    def step(state, at):
        scaled = jax.tree.map(lambda g: g * (1 + at), grads)
        _, state = tx.update(
            scaled, state, params, loss=jnp.asarray(losses, jnp.float32)[at.astype(int)]
        )
        return state, state.metrics["gradient_norm/matrix"]

    state, norms = jax.lax.scan(step, tx.init(params), jnp.arange(20.0))
    one = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    # The root of a sum of 99 squared products.
    np.testing.assert_allclose(norms, one * (1 + 3 * (np.arange(20) // 3)), rtol=52 * UNIT)
    assert monitored(state)["spike_score/loss"] == pytest.approx(3 / 20)


def test_the_structure_is_constant_and_found_in_a_flax_optimizer():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, with_monitors(ravine.adamw(0.1)), wrt=nnx.Param)
    before = monitored(optimizer.opt_state)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    after = monitored(optimizer.opt_state)
    assert list(before) == list(after)
    assert float(after["gradient_norm/matrix"]) == pytest.approx(12**0.5)
    assert float(after["gradient_norm/bias"]) == pytest.approx(2.0)
    assert not any(name.endswith("/router") for name in after)
    assert float(after["gradient_norm"]) > 0
    with pytest.raises(ValueError, match="holds 0 with_monitors"):
        monitored(ravine.sgd(0.1).init(jnp.ones(1)))
    params = {"bias": jnp.ones(1)}
    other = with_monitors(ravine.sgd(0.1), measured=["entropy"])
    with pytest.raises(ValueError, match=r"measured=\['entropy'\]"):
        other.update(params, other.init(params), params)
    watched = with_monitors(ravine.sgd(0.1)).init({"strange": jnp.ones(1)})
    assert "gradient_norm/other" in monitored(watched)


def test_logit_statistics_by_hand():
    rng = np.random.default_rng(0)
    logits = jnp.array(np.float32(rng.normal(size=(3, 5))))
    where = jnp.array([True, False, True])
    found = logit_statistics(logits.at[1].set(jnp.nan), where)
    kept = np.asarray(logits, np.float64)[[0, 2]]
    shares = np.exp(kept) / np.exp(kept).sum(axis=1, keepdims=True)
    # Sums of five terms and the logarithm; the entropy has terms of about its size, and the shares.
    entropy = np.mean(-np.sum(shares * np.log(shares), axis=1))
    assert found["entropy"] == pytest.approx(entropy, rel=32 * UNIT)
    normalizer = np.mean(np.log(np.sum(np.exp(kept), axis=1)))
    assert found["log_normalizer"] == pytest.approx(normalizer, rel=16 * UNIT)
    assert found["max_logit"] == pytest.approx(kept.max())
    sampled = jax.jit(lambda due: logit_statistics(logits, None, due))
    assert float(sampled(False)["entropy"]) == 0
    assert float(sampled(True)["entropy"]) > 0
    certain = logit_statistics(jnp.array([[1e4, -1e4, -jnp.inf]]))
    assert float(certain["entropy"]) == 0


def test_unit_norm_stays():
    params = {"embedding": tree(0)["kernel"], "bias": jnp.ones(3)}
    axis = lambda path: -1 if path == "embedding" else None
    params = unit_norm(params, axis)
    tx = optax.chain(ravine.sgd(0.3), keep_unit_norm(axis))
    state = tx.init(params)
    for seed in range(3):
        grads = {"embedding": tree(seed)["kernel"], "bias": jnp.ones(3)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # The root of four squares, the quotient, and two roundings in the update.
    norms = np.linalg.norm(np.float64(params["embedding"]), axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=8 * UNIT)
    # Three products with a rounded rate, and three differences.
    np.testing.assert_allclose(params["bias"], 1 - 3 * 0.3, rtol=0, atol=6 * UNIT)
    with pytest.raises(ValueError, match=r"bias has shape .* no axis 1"):
        keep_unit_norm(1).init(params | {"embedding": jnp.ones((2, 2))})


def test_sigma_reparam_is_the_matrix_at_first_and_finds_its_norm():
    rng = np.random.default_rng(0)
    matrix = jnp.array(np.float32(rng.normal(size=(2, 6, 4))))
    trained, state = sigma_reparam({"w": matrix})
    weights, state = sigma_weights(trained, state)
    # The largest singular value twice (by SVD and by products with its vectors), and a quotient.
    rounding = 64 * UNIT
    np.testing.assert_allclose(weights["w"], matrix, rtol=rounding)
    moved = {"w": trained["w"]._replace(matrix=jnp.array(np.float32(rng.normal(size=(2, 6, 4)))))}
    step = jax.jit(sigma_weights)
    for _ in range(60):
        weights, state = step(moved, state)
    values = np.linalg.svd(np.asarray(weights["w"], np.float64), compute_uv=False)
    # After n power iterations, the tangent of the angle has shrunk by a factor of (s2 / s1)^2n, here
    # from less than 8. The error of the norm is its square.
    left = np.max((values[:, 1] / values[:, 0]) ** (4 * 60 - 4))
    np.testing.assert_allclose(values[:, 0], trained["w"].gain, rtol=rounding + 64 * left)
    with pytest.raises(ValueError, match="takes matrices"):
        sigma_reparam({"bias": jnp.ones(3)})


def test_sigma_reparam_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        trained, state = sigma_reparam(jnp.asarray(rng.normal(size=(4, 3))))
        target = jnp.asarray(rng.normal(size=(4, 3)))

        def loss(matrix, gain):
            weights, _ = sigma_weights(trained._replace(matrix=matrix, gain=gain), state)
            return jnp.sum((weights - target) ** 2)

        # At the singular vectors themselves, where holding them fixed gives the exact gradient.
        assert_gradient(loss, trained.matrix, trained.gain)
