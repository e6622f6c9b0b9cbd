"""Sophia on part of a model, on a model sharded over a mesh, and on a model with its own state."""

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
from ravine.training.curvature import of_parameters

from .tolerances import HALF, UNIT, double, furthest

INPUTS = jax.random.normal(jax.random.key(1), (8, 4))
MLP = {
    "first": {"kernel": 0.3 * jax.random.normal(jax.random.key(3), (4, 16)), "bias": jnp.ones(16)},
    "second": {"kernel": 0.3 * jax.random.normal(jax.random.key(4), (16, 3))},
}


def mlp_logits(params, inputs=INPUTS):
    first, second = params["first"], params["second"]
    return jnp.tanh(inputs @ first["kernel"] + first["bias"][None]) @ second["kernel"]


def sophia(**options):
    return ravine.sophia_g(0.1, start=0, every=1, rho=0.1, weight_decay=0.0, **options)


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path[-1]), params)


def partitioned():
    labels = lambda params: jax.tree.map(lambda k: "own" if k else "rest", is_kernel(params))
    return optax.partition({"own": sophia(), "rest": ravine.sgd(0.1)}, labels)


PARTS = {
    "masked": lambda: optax.masked(sophia(), is_kernel),
    "masked by a prefix": lambda: optax.masked(sophia(), {"first": False, "second": True}),
    "partition": partitioned,
    "combine": lambda: ravine.combine_by_role(
        {"own": sophia(), "rest": ravine.sgd(0.1)}, {"matrix": "own", "bias": "rest"}
    ),
    "fallback": lambda: ravine.muon(0.1, fallback=sophia()),
    "both": lambda: optax.masked(
        ravine.combine_by_role(
            {"own": sophia(), "rest": ravine.sgd(0.1)}, {"matrix": "own", "bias": "rest"}
        ),
        {"first": True, "second": False},
    ),
}
NEED_PARAMS = ("masked", "masked by a prefix", "partition", "both")


@pytest.mark.parametrize("estimator", [ravine.gauss_newton_bartlett, ravine.hutchinson])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_parameters(part, estimator):
    """The estimate for a part is that part of a full estimate, with the rest of the model held fixed."""
    tx = PARTS[part]()
    if estimator is ravine.hutchinson:  # exact if the Hessian is diagonal
        function = lambda p: 0.5 * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))
    else:
        function = mlp_logits
    whole = {"params": MLP} if part in NEED_PARAMS else {}
    curvature = estimator(function, **whole)
    _, state = jax.jit(functools.partial(tx.update, curvature=curvature))(MLP, tx.init(MLP), MLP)
    (nu,) = (
        node.nu
        for node in jax.tree.leaves(
            state, is_leaf=lambda x: isinstance(x, ravine.ScaleBySophiaState)
        )
        if isinstance(node, ravine.ScaleBySophiaState)
    )
    own = jax.tree_util.tree_leaves_with_path(nu)
    assert 1 <= len(own) < 3
    for path, found in own:
        assert found.shape == functools.reduce(lambda tree, key: tree[key.key], path, MLP).shape
        if estimator is ravine.hutchinson:
            np.testing.assert_allclose(found, 0.01, rtol=4 * UNIT)
        else:
            assert 0 < float(jnp.mean(found)) < 1


@pytest.mark.parametrize("part", NEED_PARAMS)
def test_a_part_without_the_rest_is_refused(part):
    tx = PARTS[part]()
    with pytest.raises(ValueError, match=r"give the estimator all of them.*params=params"):
        tx.update(MLP, tx.init(MLP), MLP, curvature=ravine.gauss_newton_bartlett(mlp_logits))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("part", ["whole", "combine", "masked"])
def test_a_tensor_parallel_model_on_a_mesh(part):
    tx = {"whole": sophia, **PARTS}[part]()
    specs = {
        "first": {"kernel": P(None, "model"), "bias": P("model")},
        "second": {"kernel": P("model", None)},
    }
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def step(tx, params, inputs):
        def logits(params):
            hidden = params["first"]["kernel"]
            if sharded:
                hidden = jax.lax.with_sharding_constraint(hidden, P(None, "model"))
            return mlp_logits({**params, "first": {**params["first"], "kernel": hidden}}, inputs)

        curvature = ravine.gauss_newton_bartlett(logits, params=params)
        return tx.update(params, tx.init(params), params, curvature=curvature)

    sharded, (params, inputs) = False, double((MLP, INPUTS))
    expected = jax.jit(functools.partial(step, tx))(params, inputs)
    sharded = True
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        params, inputs = jax.tree.map(place, params, specs), place(inputs, P("data"))
        found = jax.jit(functools.partial(step, ravine.on_mesh(tx, specs)))(params, inputs)
    assert furthest(found, expected) <= HALF


class Regularized(nnx.Module):
    """A model with state of its own: batch statistics and dropout keys."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("name", ["g", "h", "masked"])
def test_flax_models_with_dropout_and_batch_statistics(name):
    model = Regularized(nnx.Rngs(0))
    labels = jnp.argmax(INPUTS[:, :3], axis=-1)
    tx = sophia() if name != "masked" else optax.masked(sophia(), is_kernel_of_nnx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(INPUTS), labels)
        return jnp.mean(losses)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss)(model)
        before = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        if name == "h":
            curvature = ravine.hutchinson(of_parameters(model, loss))
        else:
            curvature = ravine.gauss_newton_bartlett(of_parameters(model, lambda m: m(INPUTS)))
        optimizer.update(model, grads, curvature=curvature)
        return before

    before = step(model, optimizer)
    after = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
    same = lambda a, b: np.testing.assert_array_equal(
        jax.random.key_data(a), jax.random.key_data(b)
    )
    jax.tree.map(
        lambda a, b: (
            same(a, b)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
            else np.testing.assert_array_equal(a, b)
        ),
        after,
        before,
    )
    nu = optax.tree.get(nnx.as_pure(optimizer.opt_state), "nu")
    assert float(jnp.sum(jnp.abs(nu["first"]["kernel"]))) > 0
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(nu))


def is_kernel_of_nnx(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path), params)
