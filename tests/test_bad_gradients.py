"""Gradients that do not fit the parameters are refused at the first update by path and both shapes."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine

from .optimizers_table import TABLE

NAMES = ("embed/embedding", "layers/mlp/up/kernel", "layers/mlp/down/kernel", "head/kernel")
VECTORS = ("layers/norm/scale", "norm/scale")
SIZES = (2, 3, 4, 6)


def tree_of(names, draw):
    """Parameters (shapes only) under some of the names, and their gradients."""
    tree = {}
    for name in names:
        *rooms, last = name.split("/")
        shape = draw.choice(SIZES, 2 + name.startswith("layers")) if name in NAMES else [4]
        room = tree
        for key in rooms:
            room = room.setdefault(key, {})
        room[last] = jax.ShapeDtypeStruct(tuple(map(int, shape)), jnp.float32)
    return tree


def replaced(tree, path, new):
    """The tree with one leaf replaced, or removed if the new leaf is None."""
    key, *rest = path
    inside = {k: v for k, v in tree.items() if k != key}
    inner = replaced(tree[key], rest, new) if rest else new
    return inside if inner is None else {**inside, key: inner}


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# Each fault: a function from the shape to the wrong leaf, and the expected words of the error.
FAULTS = {
    "broadcasts": lambda shape: (struct(*shape[:-1], 1), "has shape"),
    "has an axis more": lambda shape: (struct(5, *shape), "has shape"),
    "has an axis less": lambda shape: (struct(*shape[1:]), "has shape"),
    "is transposed": lambda shape: (struct(*shape[:-1], shape[-1] + 1), "has shape"),
    "is a scalar": lambda shape: (struct(), "has shape"),
    "is int32": lambda shape: (struct(*shape, dtype=jnp.int32), "has dtype int32"),
    "is complex": lambda shape: (struct(*shape, dtype=jnp.complex64), "has dtype complex64"),
    "is a number": lambda shape: (0.5, "is a Python float"),
    "is missing": lambda shape: (None, "has no gradient"),
    "has another name": lambda shape: ({"other": struct(*shape)}, "belongs to no parameter"),
}


@pytest.mark.parametrize("row", TABLE, ids=[row.label for row in TABLE])
def test_gradients_that_do_not_fit_are_refused(row):
    """Twenty trees per optimizer: each is refused before anything is computed."""
    draw = np.random.default_rng(sum(map(ord, row.label)))
    tx = row.build()
    for number in range(2 * len(FAULTS)):
        names = list(draw.choice(NAMES, 2, replace=False))
        if not row.needs_matrices:
            names.append(str(draw.choice(VECTORS)))
        params = tree_of(names, draw)
        state = jax.eval_shape(tx.init, params)
        name = names[number % len(names)]
        shape = {path: leaf.shape for path, leaf in leaves(params)}[name]
        new, problem = list(FAULTS.values())[number % len(FAULTS)](shape)
        with pytest.raises(ValueError, match=problem) as error:
            tx.update(replaced(params, name.split("/"), new), state, params)
        assert f"{name}" in str(error.value)
        if problem == "has shape":
            assert str(shape) in str(error.value)
            assert str(new.shape) in str(error.value)


def leaves(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(key.key for key in path), leaf) for path, leaf in paths]


MOMENTS = (
    ravine.scale_by_adam,
    ravine.scale_by_adagrad,
    ravine.scale_by_adan,
    ravine.scale_by_ademamix,
    ravine.scale_by_ema_momentum,
    ravine.scale_by_lion,
    ravine.scale_by_momentum,
    ravine.scale_by_muon,
    ravine.scale_by_rmsprop,
    lambda: ravine.accumulate(ravine.sgd(0.1), 2),
)


@pytest.mark.parametrize("build", MOMENTS)
def test_moments_give_the_shapes_where_parameters_are_missing(build):
    tx, params = build(), {"w": struct(4, 6)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match=r"gradient 'w' has shape \(3, 4, 6\), its .* \(4, 6\)"):
        tx.update({"w": struct(3, 4, 6)}, state)


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 6), (4, 1)])
@pytest.mark.parametrize(
    "build", [ravine.scale_by_shampoo, ravine.scale_by_soap, ravine.scale_by_kl_shampoo]
)
def test_blocks_give_the_shapes_where_parameters_are_missing(build, shape):
    tx = build()
    state = jax.eval_shape(tx.init, {"w": struct(4, 6)})
    with pytest.raises(ValueError, match=r"not made by this optimizer .* its 'mu/w/0' has shape"):
        tx.update({"w": struct(*shape)}, state)


@pytest.mark.parametrize(
    "build", [ravine.scale_by_adam, lambda: ravine.muon(0.1), ravine.scale_by_shampoo]
)
def test_a_state_in_the_place_of_the_parameters_is_named(build):
    tx, params = build(), {"w": struct(4, 6)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(
        ValueError, match=r"params is the state .*; call tx.update\(grads, state, params"
    ):
        tx.update(params, params, state)


@pytest.mark.parametrize(
    ("estimate", "problem"),
    [
        ({"w": jnp.ones((4, 1))}, r"curvature 'w' has shape \(4, 1\), its parameter \(4, 6\)"),
        ({"w": jnp.ones((4, 6), int)}, "curvature 'w' has dtype int32"),
        ({"v": jnp.ones((4, 6))}, "curvature 'v' belongs to no parameter"),
    ],
)
def test_curvature_that_does_not_fit_is_refused(estimate, problem):
    params = {"w": jnp.ones((4, 6))}
    tx = ravine.sophia_h(0.1)
    with pytest.raises(ValueError, match=problem):
        tx.update(params, tx.init(params), params, curvature=lambda params, key: estimate)


@pytest.mark.parametrize(
    ("made_by", "problem"),
    [
        (ravine.shampoo(1e-3, blocks={"size": 4}), r"shape \(\d.*, not \("),
        (ravine.soap(1e-3), "it has no '"),
        (ravine.adamw(1e-3), "it has no '"),
        (optax.adamw(1e-3), "it has no '"),
    ],
    ids=["other blocks", "soap", "adamw", "optax"],
)
@pytest.mark.parametrize("way", [lambda tx: tx, ravine.with_telemetry])
def test_a_state_that_another_optimizer_made_is_named(made_by, problem, way):
    params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    state = way(made_by).init(params)
    with pytest.raises(ValueError, match=f"the state was not made by this optimizer.*{problem}"):
        way(ravine.shampoo(1e-3)).update(params, state, params)


def dictionaries(tree):
    """The tree as Orbax and Flax restore it without a target."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {key: dictionaries(inside) for key, inside in tree.items()}
    return list(map(dictionaries, tree)) if isinstance(tree, tuple) else tree


@pytest.mark.parametrize("build", [ravine.adamw, ravine.muon, ravine.soap])
def test_a_state_restored_without_a_target_is_named(build):
    params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    tx = build(1e-3)
    with pytest.raises(
        ValueError, match=r"is a dict in place of a \w+State.*target jax.eval_shape"
    ):
        tx.update(params, dictionaries(tx.init(params)), params)


@pytest.mark.parametrize("build", [ravine.soap, ravine.kl_shampoo])
def test_a_state_that_was_cast_is_named(build):
    params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    tx = build(1e-3)
    narrow = optax.tree.cast(tx.init(params), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"state's '.*kernel.*' has dtype bfloat16, not float32"):
        tx.update(params, narrow, params)


@pytest.mark.parametrize("build", [ravine.adamw, ravine.muon, ravine.shampoo])
@pytest.mark.parametrize("freeze", ["gradients", "parameters"])
def test_gradients_and_parameters_in_different_containers_are_named(build, freeze):
    params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
    grads, tx = params, build(1e-3)
    if freeze == "gradients":
        grads = flax.core.freeze(grads)
    else:
        params = flax.core.freeze(params)
    with pytest.raises(
        ValueError, match=r"gradients fit .* are a (dict|FrozenDict) where .*unfreeze"
    ):
        tx.update(grads, tx.init(params), params)


def test_an_update_that_fails_with_its_own_state_fails_as_it_did():
    def fail(updates, state, params=None):
        raise ZeroDivisionError("mine")

    tx = ravine.accumulate(optax.GradientTransformation(lambda params: (), fail), 2)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ZeroDivisionError, match="mine"):
        tx.update(params, tx.init(params), params)


def test_several_problems_are_reported_at_once():
    params = {name: struct(2) for name in "abcdefg"}
    tx = ravine.adamw(0.1)
    with pytest.raises(ValueError, match=r"'a'.*'b'.*'c'.*'d'.*; and 3 more\."):
        tx.update({name: struct(3) for name in params}, jax.eval_shape(tx.init, params), params)


def test_what_fits_passes_in_other_containers_and_under_masks():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
    grads = {"b": np.ones(3, np.float32), "a": jnp.ones((2, 3), jnp.bfloat16)}
    mask = {"a": True, "b": False}
    for tx in (ravine.adamw(0.1), optax.masked(ravine.adamw(0.1), mask)):
        jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)
