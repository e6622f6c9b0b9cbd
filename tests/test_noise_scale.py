"""The noise scale against its definition: known covariances, and every example's gradient by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.stability import (
    MicroBatches,
    gathered,
    noise_scale,
    squared_norms,
    with_noise_scale,
)
from ravine.stability.noise_scale import _estimates
from ravine.training.gradients import micro_batch_value_and_grad

from .tolerances import UNIT

SIZE = 12
CURVATURES = np.arange(1, SIZE + 1) ** -1.0
SPREADS = np.arange(1, SIZE + 1) ** -0.5  # of the data: power laws, as those of real gradients
START = np.linspace(0.2, 0.6, SIZE)


def of_quadratic(theta, x):
    """The loss of a batch of targets: gradient H (theta - x), covariance H S^2 H."""
    return 0.5 * jnp.mean(
        jnp.sum(CURVATURES.astype(np.float32)[None] * jnp.square(theta["kernel"] - x), axis=1)
    )


def exact():
    square = np.sum((CURVATURES * START) ** 2)
    return np.sum((CURVATURES * SPREADS) ** 2) / square


def measured(sizes, steps, tx, seed=0):
    """Noise scales after so many steps that leave the parameters, from micro-batches of such sizes."""
    params = {"kernel": jnp.asarray(START[None], jnp.float32)}
    tx = with_noise_scale(tx, decay=0.998)

    def step(state, key):
        x = jax.random.normal(key, (sum(sizes), SIZE)) * SPREADS.astype(np.float32)[None]
        parts = jnp.split(x, np.cumsum(sizes)[:-1])
        grads = [jax.grad(of_quadratic)(params, part) for part in parts]
        squares = [squared_norms(g, state, tx=tx) for g in grads]
        weights = jnp.asarray(sizes, jnp.float32)
        micro = MicroBatches(jax.tree.map(lambda *s: jnp.stack(s), *squares), weights)
        total = sum(sizes)
        mean = jax.tree.map(
            lambda *g: sum(w / total * x for w, x in zip(sizes, g, strict=True)), *grads
        )
        return tx.update(mean, state, params, micro_batches=micro)[1], None

    keys = jax.random.split(jax.random.key(seed), steps)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(params))
    return noise_scale(state)


@pytest.mark.parametrize("sizes", [(16, 16), (8,) * 8, (2, 30), (1, 7, 24)])
def test_a_known_covariance_is_found(sizes):
    """Within the 20 % asked for; micro-batches of unequal sizes are as unbiased as equal ones.

    The averages take in 1,000 steps, (1 + decay) / (1 - decay). With 32 examples in two micro-batches,
    the noisiest, an estimate of |G|^2 has a variance of 4 G'SG / W + 4 tr S^2 / W^2 = 1.03 |G|^4,
    so that of the average has a deviation of 3.2 %: 20 % is six.
    """
    found = measured(sizes, 4000, optax.sgd(0.0))
    assert float(found["noise_scale"]) == pytest.approx(exact(), rel=0.2)


def test_preconditioned_by_the_second_moment():
    tx = optax.chain(optax.scale_by_rms(decay=0.99), optax.scale(0.0))
    found = measured((16,) * 4, 4000, tx)
    total = 64
    variances, means = (CURVATURES * SPREADS) ** 2, CURVATURES * START
    p = 1 / np.sqrt(means**2 + variances / total)  # of E v, up to its fluctuation
    expected = np.sum(p * variances) / np.sum(p * means**2)
    assert float(found["preconditioned_noise_scale"]) == pytest.approx(expected, rel=0.1)
    assert abs(expected / exact() - 1) > 0.3  # it is another number


@functools.cache
def brute_force():
    """A small network on 512 examples: |G|^2 and tr Sigma from every example's gradient, in float64."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(512, 6)) * np.arange(1, 7) ** -0.5
    x = jnp.asarray(inputs, jnp.float32)
    y = jnp.array(np.float32(np.sin(inputs @ rng.normal(size=(6, 1)))))
    params = {
        "up": {"kernel": jnp.array(np.float32(rng.normal(size=(6, 16)) * 0.4))},
        "down": {"kernel": jnp.array(np.float32(rng.normal(size=(16, 1)) * 0.4))},
    }

    def loss(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] - y) ** 2)

    one = lambda x, y: jax.grad(loss)(params, (x[None], y[None]))
    each = np.concatenate(
        [np.asarray(g, np.float64).reshape(512, -1) for g in jax.tree.leaves(jax.vmap(one)(x, y))],
        1,
    )
    scale = each.var(axis=0).sum() / np.sum(each.mean(axis=0) ** 2)
    return params, loss, (x, y), scale


def test_a_network_against_the_gradient_of_every_example():
    params, loss, (x, y), expected = brute_force()
    tx = with_noise_scale(ravine.sgd(0.0), decay=0.995)
    loss_and_grads = micro_batch_value_and_grad(
        loss, 8, tokens=lambda batch: batch[0].shape[0], measure=squared_norms
    )

    def step(state, key):
        rows = jax.random.randint(key, (64,), 0, 512)
        _, grads, micro = loss_and_grads(params, (x[rows], y[rows]))
        return tx.update(grads, state, params, micro_batches=micro)[1], None

    keys = jax.random.split(jax.random.key(2), 2000)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(params))
    assert float(noise_scale(state)["noise_scale"]) == pytest.approx(expected, rel=0.2)


def test_devices_are_micro_batches():
    params, loss, (x, y), _ = brute_force()
    x, y = x[:64], y[:64]
    mesh = jax.make_mesh((8,), ("data",))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))

    def on_device(x, y):
        grads = jax.grad(loss)(params, (x, y))
        micro = gathered(squared_norms(grads), x.shape[0], "data")
        return jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads), micro

    mapped = jax.jit(jax.shard_map(on_device, mesh=mesh, out_specs=P(), check_vma=False))
    by_device = mapped(put(x), put(y))
    # Micro-batches take every eighth row: rows in the order that gives them a device's.
    order = np.arange(64).reshape(8, 8).T.ravel()
    tokens = lambda batch: batch[0].shape[0]
    loss_and_grads = micro_batch_value_and_grad(loss, 8, tokens=tokens, measure=squared_norms)
    _, *by_scan = jax.jit(loss_and_grads)(params, (x[order], y[order]))
    # Sums of 64 and 8 terms in another order: 64 roundings at most.
    for got, want in zip(jax.tree.leaves(by_device), jax.tree.leaves(tuple(by_scan)), strict=True):
        scale = float(np.max(np.abs(want)))
        np.testing.assert_allclose(got, want, rtol=0, atol=64 * UNIT * scale)


def test_seeds_on_a_mesh_are_measured_as_one_by_one():
    tx = with_noise_scale(ravine.scale_by_adam())
    mesh = jax.make_mesh((2, 2), ("seed", "x"), devices=jax.devices()[:4])
    grads = {"kernel": jnp.arange(64.0).reshape(2, 4, 8)}

    def update(grads, weight):
        state = tx.init(grads)
        squares = {name: jnp.ones(2) for name in state.squares}
        measured = MicroBatches(squares, jnp.full(2, weight))
        return noise_scale(tx.update(grads, state, grads, micro_batches=measured)[1])

    step, weights = jax.jit(jax.vmap(update)), jnp.array([0.0, 4.0])
    expected = step(grads, weights)
    with jax.set_mesh(mesh):
        shardings = NamedSharding(mesh, P("seed", "x")), NamedSharding(mesh, P("seed"))
        found = step(*jax.device_put((grads, weights), shardings))
    jax.tree.map(np.testing.assert_allclose, found, expected)


PARAMS = {"up": {"kernel": jnp.ones((2, 3))}, "bias": jnp.ones(3)}


def micro(squares=(1.0, 2.0), weights=(4.0, 4.0), names=("bias", "matrix")):
    return MicroBatches({name: jnp.asarray(squares) for name in names}, jnp.asarray(weights))


def test_updates_are_those_of_the_inner_optimizer_and_the_state_is_constant_in_structure():
    inner = ravine.adamw(0.1)
    tx = with_noise_scale(inner)
    state, plain = tx.init(PARAMS), inner.init(PARAMS)
    names = ("bias", "matrix", "preconditioned/bias", "preconditioned/matrix")
    for _ in range(2):
        updates, new = jax.jit(tx.update)(PARAMS, state, PARAMS, micro_batches=micro(names=names))
        expected, plain = jax.jit(inner.update)(PARAMS, plain, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        state = new


@pytest.mark.parametrize(
    "nothing", [None, micro(weights=(0.0, 0.0)), micro(weights=(4.0, 0.0)), micro((jnp.nan, 1.0))]
)
def test_nothing_measured_changes_nothing(nothing):
    tx = with_noise_scale(ravine.sgd(0.1))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, micro_batches=micro())
    _, after = tx.update(PARAMS, state, PARAMS, micro_batches=nothing)
    assert after.squares == state.squares
    assert after.traces == state.traces


def test_a_gradient_lost_in_the_noise_is_infinite():
    tx = with_noise_scale(ravine.sgd(0.1), decay=0.0)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, micro_batches=micro())
    assert noise_scale(state)["noise_scale"] == jnp.inf


def test_bad_input_is_refused():
    tx = with_noise_scale(ravine.sgd(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="at least two micro-batches per step, got 1"):
        tx.update(PARAMS, state, PARAMS, micro_batches=micro((1.0,), (4.0,)))
    with pytest.raises(ValueError, match=r"measured as \['head'\].*same rules"):
        tx.update(PARAMS, state, PARAMS, micro_batches=micro(names=("head",)))
    with pytest.raises(ValueError, match="there is only one; take at least 2"):
        micro_batch_value_and_grad(lambda p, b: 0.0, 1, measure=squared_norms)
    with pytest.raises(ValueError, match="decay must be below 1"):
        with_noise_scale(ravine.sgd(0.1), decay=1.0)
    with pytest.raises(ValueError, match="2 with_noise_scale, not one"):
        noise_scale((state, state))


def test_in_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, with_noise_scale(ravine.adamw(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        graphdef, params = nnx.split(model, nnx.Param)
        loss = lambda p, b: jnp.mean(nnx.merge(graphdef, p)(b) ** 2)
        opt_state = nnx.as_pure(optimizer.opt_state)
        measure = lambda grads: squared_norms(grads, opt_state, tx=optimizer.tx)
        loss_and_grads = micro_batch_value_and_grad(loss, 4, measure=measure)
        _, grads, micro = loss_and_grads(params, batch)
        optimizer.update(model, grads, micro_batches=micro)

    for seed in range(2):
        step(model, optimizer, jax.random.normal(jax.random.key(seed), (8, 3)))
    found = noise_scale(optimizer.opt_state)
    assert float(found["noise_scale/matrix"]) > 0
    assert float(found["preconditioned_noise_scale"]) > 0


ROWS, COLUMNS = 4, 6
MEAN = np.outer(np.linspace(0.2, 1.0, ROWS), np.linspace(1.0, -0.5, COLUMNS)) + 0.1 * np.eye(4, 6)
DEVIATIONS = np.outer(np.arange(1, ROWS + 1) ** -0.5, np.linspace(0.5, 1.5, COLUMNS))


def polar_norm(state):
    """P of Muon's state before a step, in float64: the inverse root of the momentum's Gram matrix."""
    (mu,) = jax.tree.leaves(optax.tree.get(state, "mu"))
    mu = np.asarray(mu, np.float64)
    values, vectors = np.linalg.eigh(mu @ mu.T)
    return np.kron((vectors * values**-0.5) @ vectors.T, np.eye(COLUMNS))


def roots_norm(state):
    """Of Shampoo's: the Kronecker products of the roots of its six blocks of two by two."""
    (factors,) = optax.tree.get(state, "factors")["kernel"]
    left, right = (np.asarray(x.root, np.float64).reshape(2, 3, 2, 2) for x in factors)
    whole = np.zeros((ROWS, COLUMNS, ROWS, COLUMNS))
    for i, j in np.ndindex(2, 3):
        rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        block = np.einsum("ab,cd->acbd", left[i, j], right[i, j])
        whole[rows, columns, rows, columns] = block
    return whole.reshape(ROWS * COLUMNS, -1)


def basis_norm(state):
    """Of SOAP's, of one block: 1 / sqrt(v) in the eigenbasis."""
    (axes,) = optax.tree.get(state, "bases")["kernel"]
    (nu,) = optax.tree.get(state, "nu")["kernel"]
    left, right = (np.asarray(x.vectors, np.float64).squeeze() for x in axes)
    turned = np.kron(left.T, right.T)
    return turned.T @ (np.asarray(nu, np.float64).reshape(-1, 1) ** -0.5 * turned)


# What multiplies rounding to float32, from the condition of P: the number of terms of the quadratic form
# times it; for Muon's root of a Gram matrix, of its elements' terms times the square.
of_form = lambda condition: ROWS * COLUMNS * condition
of_gram = lambda condition: COLUMNS * condition**2


@pytest.mark.parametrize(
    ("tx", "norm", "roundings"),
    [
        (ravine.scale_by_muon(0.9), polar_norm, of_gram),
        (ravine.scale_by_shampoo(blocks=ravine.Blocks(size=2)), roots_norm, of_form),
        (ravine.scale_by_soap(refresh=ravine.Refresh(every=5)), basis_norm, of_form),
    ],
    ids=["muon", "shampoo", "soap"],
)
def test_in_the_norm_of_a_matrix_optimizer(tx, norm, roundings):
    """A quadratic's gradient is H theta plus noise of a known covariance: within the 20 % asked for.

    The optimizer learns for some steps; then its state is held, so that the norm is one norm. 2,000
    steps of 4 micro-batches of 8: the deviation of the estimate of |G|^2 in it is below 3 %.
    """
    params, key = {"kernel": jnp.asarray(MEAN, jnp.float32)}, jax.random.key(0)

    def sampled(key, count):
        noise = jax.random.normal(key, (count, ROWS, COLUMNS)) * jnp.asarray(
            DEVIATIONS[None], jnp.float32
        )
        return {"kernel": jnp.asarray(MEAN[None], jnp.float32) + noise}

    state, update = tx.init(params), jax.jit(tx.update)
    for each in jax.random.split(key, 12):
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), sampled(each, 32))
        _, state = update(grads, state, params)

    def estimates(key):
        parts = jax.tree.map(
            lambda g: g.reshape(4, 8, ROWS, COLUMNS).mean(axis=1), sampled(key, 32)
        )
        squares = [
            squared_norms(jax.tree.map(lambda g, at=at: g[at], parts), state, tx=tx)
            for at in range(4)
        ]
        weights = jnp.full(4, 8.0)
        micro = MicroBatches(jax.tree.map(lambda *s: jnp.stack(s), *squares), weights)
        whole = jax.tree.map(lambda g: g.mean(axis=0), parts)
        name = "preconditioned/matrix"
        return _estimates(micro, name, squared_norms(whole, state, tx=tx)[name])[0]

    square, trace = jax.jit(jax.vmap(estimates))(jax.random.split(jax.random.key(1), 2000))
    p = norm(state)
    expected = np.sum(np.diag(p) * DEVIATIONS.ravel() ** 2) / (MEAN.ravel() @ p @ MEAN.ravel())
    assert float(trace.mean() / square.mean()) == pytest.approx(expected, rel=0.2)
    plain = np.sum(DEVIATIONS**2) / np.sum(MEAN**2)
    assert abs(expected / plain - 1) > 0.25  # it is another number
    trace_of = np.trace(p) / p.shape[0]
    found = squared_norms(params, state, tx=tx)["preconditioned/matrix"]
    bound = roundings(np.linalg.cond(p)) * UNIT
    assert float(found) == pytest.approx(MEAN.ravel() @ p @ MEAN.ravel() / trace_of, rel=bound)
