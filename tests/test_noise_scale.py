"""The noise scale against its definition: known covariances, and the gradient of each single example."""

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
from ravine.training.gradients import micro_batch_value_and_grad

from .standard_errors import independent, of_noise_scale
from .tolerances import UNIT

SIZE = 12
CURVATURES = np.arange(1, SIZE + 1) ** -1.0
SPREADS = np.arange(1, SIZE + 1) ** -0.5  # of the data: power laws, like those of real gradients
START = np.linspace(0.2, 0.6, SIZE)
VARIANCES = (CURVATURES * SPREADS) ** 2
DECAY, STEPS = 0.9998, 4000  # nearly a plain mean
AVERAGED = independent(DECAY, STEPS)


def of_quadratic(theta, x):
    """The loss for a batch of targets: gradient H (theta - x), covariance H S^2 H."""
    return 0.5 * jnp.mean(
        jnp.sum(CURVATURES.astype(np.float32)[None] * jnp.square(theta["kernel"] - x), axis=1)
    )


def exact(norm=1.0):
    """The exact value in a diagonal norm."""
    return np.sum(norm * VARIANCES) / np.sum(norm * (CURVATURES * START) ** 2)


def measured(sizes, tx, nu=None):
    """Noise scales from micro-batches of these sizes, after steps that keep the parameters."""
    params = {"kernel": jnp.asarray(START[None], jnp.float32)}
    tx = with_noise_scale(tx, decay=DECAY)
    start = tx.init(params)
    if nu is not None:
        start = optax.tree.set(start, nu={"kernel": jnp.asarray(nu[None], jnp.float32)})

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

    keys = jax.random.split(jax.random.key(0), STEPS)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(start)
    return noise_scale(state)


@pytest.mark.parametrize("sizes", [(16, 16), (8,) * 8, (2, 30), (1, 7, 24)])
def test_a_known_covariance_is_found(sizes):
    """Unequal micro-batches are as unbiased as equal ones: within five standard errors.

    With 32 examples in two micro-batches, the noisiest case, one standard error is 3 %, mostly from the
    trace.
    """
    found = measured(sizes, optax.sgd(0.0))
    of_one = CURVATURES * START, np.diag(VARIANCES)
    error = of_noise_scale(*of_one, sum(sizes), len(sizes), AVERAGED)
    assert float(found["noise_scale"]) == pytest.approx(exact(), rel=5 * error)


def test_preconditioned_by_the_second_moment():
    """The second moment has a decay of 1, so it stays fixed and the norm does not change."""
    nu = (CURVATURES * START) ** 2 + VARIANCES / 64
    tx = optax.chain(optax.scale_by_rms(decay=1.0), optax.scale(0.0))
    found = measured((16,) * 4, tx, nu)
    p = nu**-0.5
    of_one = p**0.5 * CURVATURES * START, np.diag(p * VARIANCES)
    error = of_noise_scale(*of_one, 64, 4, AVERAGED)
    assert float(found["preconditioned_noise_scale"]) == pytest.approx(exact(p), rel=5 * error)
    assert abs(exact(p) / exact() - 1) > 0.3  # a different number


@functools.cache
def brute_force():
    """A small network on 512 examples: the float64 noise scale from the gradient of each single example.

    Also its relative standard error when measured with 2,000 steps of 8 micro-batches of 8.
    """
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
    mean = each.mean(axis=0)
    scale = each.var(axis=0).sum() / np.sum(mean**2)
    off, covariance = each - mean, np.cov(each, rowvar=False, ddof=0)
    lengths = np.sum(off**2, axis=1)
    skew, kurtosis = np.mean(off @ mean * lengths), lengths.var() - 2 * np.sum(covariance**2)
    error = of_noise_scale(mean, covariance, 64, 8, independent(0.9995, 2000), skew, kurtosis)
    return params, loss, (x, y), scale, error


def test_a_network_against_the_gradient_of_every_example():
    params, loss, (x, y), expected, error = brute_force()
    tx = with_noise_scale(ravine.sgd(0.0), decay=0.9995)
    loss_and_grads = micro_batch_value_and_grad(
        loss, 8, tokens=lambda batch: batch[0].shape[0], measure=squared_norms
    )

    def step(state, key):
        rows = jax.random.randint(key, (64,), 0, 512)
        _, grads, micro = loss_and_grads(params, (x[rows], y[rows]))
        return tx.update(grads, state, params, micro_batches=micro)[1], None

    keys = jax.random.split(jax.random.key(2), 2000)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))(tx.init(params))
    assert float(noise_scale(state)["noise_scale"]) == pytest.approx(expected, rel=5 * error)


def test_devices_are_micro_batches():
    params, loss, (x, y), *_ = brute_force()
    x, y = x[:64], y[:64]
    mesh = jax.make_mesh((8,), ("data",))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))

    def on_device(x, y):
        grads = jax.grad(loss)(params, (x, y))
        micro = gathered(squared_norms(grads), x.shape[0], "data")
        return jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads), micro

    mapped = jax.jit(jax.shard_map(on_device, mesh=mesh, out_specs=P(), check_vma=False))
    by_device = mapped(put(x), put(y))
    # Micro-batches take every eighth row; this order gives them the rows of a device.
    order = np.arange(64).reshape(8, 8).T.ravel()
    tokens = lambda batch: batch[0].shape[0]
    loss_and_grads = micro_batch_value_and_grad(loss, 8, tokens=tokens, measure=squared_norms)
    _, *by_scan = jax.jit(loss_and_grads)(params, (x[order], y[order]))
    # Sums of 64 and 8 terms in another order: at most 64 roundings.
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
