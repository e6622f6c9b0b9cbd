"""Every registered optimizer in every place where people put optimizers: the same numbers everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx
from flax.nnx.spmd import get_var_pspec
from jax.sharding import AxisType, NamedSharding

from .optimizers_table import builder

STEPS = 3
SPECS = {"dense": {"bias": (None,), "kernel": ("data", "model")}, "norm": {"scale": (None,)}}

every_optimizer = pytest.mark.parametrize("name", ravine.names())


def tree(seed):
    """Parameters, or gradients with another seed: correlated, with a spectrum that falls off."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 6))
    spectrum = np.eye(4, 6) * np.arange(1.0, 7.0) ** -1.5
    array = lambda x: jnp.asarray(x, jnp.float32)
    return {
        "dense": {"bias": array(rng.normal(size=6)), "kernel": array(left @ spectrum @ right)},
        "norm": {"scale": array(rng.normal(size=4))},
    }


GRADIENTS = [tree(seed) for seed in range(1, STEPS + 1)]


@functools.cache
def build(name):
    options = {"every": 2} if ravine.OptimizerConfig(name).accepts("every") else {}
    return builder(name)(1e-2, **options)


@functools.cache
def plain(name):
    """Parameters and state after the steps, in plain dictionaries."""
    tx = build(name)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = tree(0), tx.init(tree(0))
    for grads in GRADIENTS:
        params, state = step(params, state, grads)
    return params, state


class Model(nnx.Module):
    """The tree as a module of NNX."""

    def __init__(self, seed=0, *, partitioned=False):
        for name, group in tree(seed).items():
            module = nnx.Module()
            for key, value in group.items():
                sharding = {"out_sharding": SPECS[name][key]} if partitioned else {}
                setattr(module, key, nnx.Param(value, **sharding))
            setattr(self, name, module)


def update(model, optimizer, grads):
    optimizer.update(model, grads)


def train(name, update, wrt=nnx.Param, **options):
    """Parameters and state after the steps in an `nnx.Optimizer`."""
    model = Model(**options)
    optimizer = nnx.Optimizer(model, build(name), wrt=wrt)
    structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    for seed in range(1, STEPS + 1):
        update(model, optimizer, nnx.state(Model(seed, **options), wrt))
    state = nnx.as_pure(optimizer.opt_state)
    assert jax.tree.structure(state) == structure
    return nnx.as_pure(nnx.state(model)), state


def assert_same(found, expected, tolerance=0.0):
    """The same numbers, whatever the trees are made of."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b), initial=0))


@every_optimizer
def test_nnx_jitted(name):
    assert_same(train(name, nnx.jit(update)), plain(name))


@every_optimizer
def test_nnx_with_partitioned_variables(name):
    # What is kept beside a parameter has other axes: it must not be sharded like it.
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    with jax.set_mesh(mesh):
        model = Model(partitioned=True)
        optimizer = nnx.Optimizer(model, build(name), wrt=nnx.Param)
        before = jax.eval_shape(lambda: nnx.state(optimizer))
        is_variable = lambda node: isinstance(node, nnx.Variable)
        for variable in jax.tree.leaves(nnx.state(optimizer), is_leaf=is_variable):
            for x in jax.tree.leaves(variable):
                NamedSharding(mesh, get_var_pspec(variable)).shard_shape(x.shape)

        @jax.eval_shape
        def after():
            new = nnx.clone(optimizer)
            new.update(nnx.clone(model), nnx.state(Model(1, partitioned=True), nnx.Param))
            return nnx.state(new)

        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert jax.tree.leaves(after) == jax.tree.leaves(before)
