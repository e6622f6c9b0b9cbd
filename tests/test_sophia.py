"""Sophia: its curvature, when it is estimated, its win rate, Flax NNX and data parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ravine.stability import next_token_loss
from ravine.training.compare.entrants import Entrant
from ravine.training.config import RunConfig
from ravine.training.curvature import of_parameters
from ravine.training.data.batches import train_batches
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.programs import Programs
from ravine.training.sharding import batch_sharding, build_mesh
from ravine.training.step import init_params, init_state, make_train_step

from .run_rounding import rounding_of
from .tolerances import HALF, double, furthest

INPUTS = jax.random.normal(jax.random.key(1), (8, 4))
WEIGHTS = 0.5 * jax.random.normal(jax.random.key(2), (4, 3))


def logits(params):
    return INPUTS @ params


def test_bartlett_is_unbiased_for_the_gauss_newton_diagonal():
    curvature = ravine.gauss_newton_bartlett(logits)
    keys = jax.random.split(jax.random.key(0), 4000)
    estimates = jax.jit(jax.vmap(lambda key: curvature(WEIGHTS, key)))(keys)
    # The Hessian of the mean cross-entropy does not depend on the labels, so it equals Gauss-Newton.
    loss = lambda p: jnp.mean(jax.nn.logsumexp(logits(p), axis=-1))
    hessian = jax.jit(jax.hessian(loss))(WEIGHTS).reshape(12, 12)
    error = jnp.abs(jnp.mean(estimates, axis=0).ravel() - jnp.diag(hessian))
    assert jnp.all(error <= 5 * jnp.std(estimates, axis=0).ravel() / 4000**0.5)


def test_bartlett_leaves_out_what_does_not_count():
    where = jnp.arange(8) < 5
    part = ravine.gauss_newton_bartlett(logits, where=where)
    poisoned = ravine.gauss_newton_bartlett(
        lambda p: jnp.where(where[:, None], logits(p), 1e6), where=where
    )
    key = jax.random.key(0)
    np.testing.assert_array_equal(part(WEIGHTS, key), poisoned(WEIGHTS, key))


def test_hutchinson_is_unbiased_and_exact_for_diagonals():
    matrix = jnp.array([[2.0, 1.0], [1.0, -3.0]])
    loss = lambda p: 0.5 * p @ matrix @ p
    found = ravine.hutchinson(loss, samples=4000)(jnp.ones(2), jax.random.key(0))
    # The error of an element is the other element of its row, with a random sign.
    np.testing.assert_allclose(found, [2.0, -3.0], rtol=0, atol=5 / 4000**0.5)
    diagonal = lambda p: jnp.sum(jnp.array([2.0, -3.0]) * jnp.square(p))
    found = ravine.hutchinson(diagonal)(jnp.ones(2), jax.random.key(0))
    np.testing.assert_array_equal(found, [4.0, -6.0])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        ravine.hutchinson(loss, samples=0)


def test_curvature_is_estimated_at_its_steps_only_and_win_rate_is_in_the_state():
    tx = ravine.scale_by_sophia(0.0, 0.0, 1.0, every=3, start=2)
    seen = []

    def curvature(params, key):
        jax.debug.callback(lambda: seen.append(1))
        return {"w": jnp.array([1.0, 4.0, 4.0, 0.5])}

    @jax.jit
    def update(grads, state, params):
        return tx.update(grads, state, params, curvature=curvature)

    params = {"w": jnp.zeros(4)}
    grads, state, counts, rates = {"w": jnp.array([2.0, 2.0, -1.0, 0.0])}, tx.init(params), [], []
    for _ in range(7):
        updates, state = update(grads, state, params)
        jax.effects_barrier()
        counts.append(len(seen))
        rates.append(float(state.win_rate))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    assert rates == [0.0, 0.0, 0.75, 0.75, 0.75, 0.75, 0.75]
    np.testing.assert_allclose(updates["w"], [1.0, 0.5, -0.25, 0.0])


def test_keys_differ_between_estimates_and_agree_between_runs():
    tx = ravine.scale_by_sophia(0.0, 0.0, 1.0, every=1)
    curvature = lambda params, key: jax.random.uniform(key, (2,))
    state, found = tx.init(jnp.zeros(2)), []
    for _ in range(2):
        _, state = tx.update(jnp.ones(2), state, jnp.zeros(2), curvature=curvature)
        found.append(state.nu)
    _, again = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2), curvature=curvature)
    assert jnp.any(found[0] != found[1])
    np.testing.assert_array_equal(again.nu, found[0])


@pytest.mark.usefixtures("float64")
def test_equals_optaxs_sophia_where_the_hessian_is_constant():
    """Optax uses an estimate one update later, so ours starts at the second update."""
    scales = jnp.array([0.1, 1.0, 10.0])
    loss = lambda p: 0.5 * jnp.sum(scales * jnp.square(p))
    ours = ravine.sophia_h(0.05, rho=0.5, every=4, start=1, correct_bias=True, weight_decay=0.1)
    theirs = optax.contrib.sophia(0.05, gamma=0.5, eps=1e-12, update_interval=4, weight_decay=0.1)

    def train(tx, **extra):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
            return optax.apply_updates(params, updates), state

        params = jnp.array([1.0, -2.0, 3.0])
        state = tx.init(params)
        for _ in range(20):
            params, state = step(params, state)
        return params

    mine = train(ours, curvature=ravine.hutchinson(loss))
    with jax.numpy_dtype_promotion("standard"):
        other = train(theirs, obj_fn=loss)
    np.testing.assert_allclose(mine, other, rtol=HALF)


def test_in_an_nnx_loop():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    labels = jnp.argmax(INPUTS[:, :3], axis=-1)
    tx = ravine.sophia_g(0.05, rho=0.1, every=2, start=0, weight_decay=0.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(INPUTS), labels)
            return jnp.mean(losses)

        value, grads = nnx.value_and_grad(loss)(model)
        curvature = ravine.gauss_newton_bartlett(of_parameters(model, lambda m: m(INPUTS)))
        optimizer.update(model, grads, curvature=curvature)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < float(optax.tree.get(nnx.as_pure(optimizer.opt_state), "win_rate")) <= 1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["g", "h"])
def test_data_parallel(name, check_vma):
    """Under shard_map, all devices get the same estimate, on average that of a single device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    labels = jnp.arange(8) % 3
    keys = jax.random.split(jax.random.key(0), 300)

    def estimates(inputs, labels, params, axis_name=None):
        logits = lambda p: inputs @ p
        if name == "g":
            estimator = ravine.gauss_newton_bartlett(logits, axis_name=axis_name)
        else:
            entropy = optax.softmax_cross_entropy_with_integer_labels
            loss = lambda p: jnp.mean(entropy(logits(p), labels))
            estimator = ravine.hutchinson(loss, axis_name=axis_name)
        return jax.lax.map(lambda key: estimator(params, key), keys)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P()),
        out_specs=P() if check_vma else P("data"),
        check_vma=check_vma,
    )
    def on_every_device(inputs, labels, params):
        return estimates(inputs, labels, params, "data")

    inputs, weights = double((INPUTS, WEIGHTS))
    found = jax.jit(on_every_device)(inputs, labels, weights)
    if not check_vma:
        found = found.reshape(8, 300, *WEIGHTS.shape)
        np.testing.assert_array_equal(found, jnp.broadcast_to(found[:1], found.shape))
        found = found[0]
    alone = jax.jit(estimates)(inputs, labels, weights)
    if name == "h":  # the same random signs
        assert furthest(found, alone) <= HALF
    else:  # different samples
        found, alone = (jnp.sum(x, axis=(1, 2)) for x in (found, alone))
        deviation = jnp.sqrt((jnp.var(found) + jnp.var(alone)) / 300)
        assert jnp.abs(jnp.mean(found) - jnp.mean(alone)) <= 5 * deviation


def test_faults():
    params = jnp.ones(2)
    for tx in (ravine.sophia_g(1e-3), ravine.sophia_h(1e-3)):
        with pytest.raises(ValueError, match=r"Sophia needs an estimator.*curvature="):
            tx.update(params, tx.init(params), params)
        with pytest.raises(ValueError, match="Sophia needs the parameters"):
            tx.update(params, tx.init(params), curvature=lambda p, key: p)
    for bad in ({"every": 0}, {"start": -1}, {"eps": 0.0}, {"rho": -1.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))} must be "):
            ravine.scale_by_sophia(**bad)


def test_in_the_trainers_step():
    config = ModelConfig(width=16, layers=1)
    graphdef, params = init_params(config, seed=0)
    state = init_state(params, ravine.sophia_g(1e-3, start=0, every=2))
    step = jax.jit(make_train_step(graphdef, ravine.sophia_g(1e-3, start=0, every=2), 2))
    batch = jnp.arange(4 * 9).reshape(4, 9) % 50
    for _ in range(2):
        state, metrics = step(state, batch)
    assert jnp.isfinite(metrics["loss"])
    assert float(optax.tree.get(state.opt_state, "win_rate")) > 0


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_the_trainer_gives_each_its_own_estimate(name, corpus):
    """Hutchinson's has negative entries, as the Hessian; the other is a square."""
    config = RunConfig(model=ModelConfig(width=16, layers=1, heads=1, context=16), batch_size=4)
    entrant = Entrant(ravine.OptimizerConfig(name, {"start": 0, "b2": 0.0}), 1e-3)
    mesh = build_mesh()
    placed = place(config.model, entrant.build(config), mesh)
    batch = next(train_batches(corpus, batch_size=4, context=16, seed=0))
    with jax.set_mesh(mesh):
        state = placed.init(0)
        programs = Programs(config, placed, batch_sharding(mesh, 4), name)
        before = jax.tree.map(jnp.array, state.params)
        after, *_ = programs.of(4, state)[1](state, batch)
    found = optax.tree.get(after.opt_state, "nu")
    key = jax.random.fold_in(jax.random.key(0), 0)
    logits = lambda params: nnx.merge(placed.graphdef, params)(batch[:, :-1])
    loss = lambda params: next_token_loss(logits(params), batch[:, 1:])
    estimates = {
        "sophia_g": ravine.gauss_newton_bartlett(logits),
        "sophia_h": ravine.hutchinson(loss),
    }
    estimated = jax.jit(lambda params: estimates[name](params, key))
    assert furthest(found, estimated(before)) <= rounding_of(estimated, before)
    assert (min(float(jnp.min(x)) for x in jax.tree.leaves(found)) < 0) == (name == "sophia_h")
