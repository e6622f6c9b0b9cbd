"""The norm that a matrix optimizer applies to gradients: checked by definition, step and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.optimizers.own_norms import own_norms
from ravine.optimizers.preconditioners.inverse_roots import Factor
from ravine.stability import squared_norms, with_noise_scale

from .tolerances import HALF, UNIT

ATTENTION = {"query": {"kernel": (8, 2, 4)}, "out": {"kernel": (2, 4, 8)}}
BLOCKS = ravine.Blocks(size=4)


def grads_of(shapes, seed=0):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    each = [jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, each)


def filled(state, seed=0):
    """A state as it is after some steps: symmetric roots, orthonormal bases, positive moments."""
    random = np.random.default_rng(seed)

    def leaf(path, x):
        field = next((k.name for k in reversed(path) if getattr(k, "name", "") in MADE), "")
        return jnp.asarray(MADE[field](random.normal(size=x.shape)), x.dtype) if field else x

    return jax.tree_util.tree_map_with_path(leaf, state)


def symmetric(x):
    return x + np.swapaxes(x, -2, -1) + 9 * np.eye(x.shape[-1]) if x.shape[-1] == x.shape[-2] else x


MADE = {
    "count": lambda x: 5,
    "mu": lambda x: x,
    "nu": np.square,
    "root": symmetric,
    "eigenvalues": np.square,
    "vectors": lambda x: np.linalg.qr(x)[0],
}


def of(tx, shapes):
    """A state and a gradient."""
    grads = grads_of(shapes)
    return filled(jax.jit(tx.init)(grads)), grads


def norms(tx, grads, state):
    return jax.jit(lambda grads, state: own_norms(tx, grads, state))(grads, state)


@pytest.mark.usefixtures("float64")
def test_kl_shampoo_multiplies_the_gradient_by_it():
    """Without momentum its step is P[G], with the factors from before this gradient."""
    tx = ravine.scale_by_kl_shampoo(0.0)
    state, grads = of(tx, {"kernel": (8, 6)})
    step, _ = jax.jit(tx.update)(grads, state)
    norm = norms(tx, grads, state)["kernel"]
    np.testing.assert_allclose(norm.square, jnp.vdot(grads["kernel"], step["kernel"]), rtol=HALF)
    tx = with_noise_scale(ravine.kl_shampoo(1e-3))
    state = jax.eval_shape(tx.init, grads_of({"up": {"kernel": (8, 6), "bias": (6,)}}))
    assert set(state.squares) == {"bias", "matrix", "preconditioned/bias", "preconditioned/matrix"}


@pytest.mark.usefixtures("float64")
def test_muon_of_an_attention_kernel_has_the_norm_of_its_matrix():
    tx = ravine.muon(0.02)
    state, grads = of(tx, ATTENTION)
    mu = state.inner_states["muon"].inner_state[0][0].mu
    found = norms(tx, grads, state)
    for name in ATTENTION:
        m, g = (np.asarray(x[name]["kernel"], np.float64).reshape(8, 8) for x in (mu, grads))
        values, vectors = np.linalg.eigh(m @ m.T)
        p = (vectors * values**-0.5) @ vectors.T
        norm = found[f"{name}/kernel"]
        np.testing.assert_allclose(norm.square, np.trace(g.T @ p @ g), rtol=HALF)
        np.testing.assert_allclose(norm.trace, 8 * np.trace(p), rtol=HALF)


def test_rows_of_an_equinox_matrix_are_its_inputs():
    """The matrix is [out, in], and only the inputs have a factor."""
    tx = ravine.shampoo(1e-3, blocks={"sides": "rows"})
    state, grads = of(tx, {"linear": {"weight": (6, 4)}})
    is_factor = lambda node: isinstance(node, Factor)
    (factor,) = filter(is_factor, jax.tree.leaves(state, is_leaf=is_factor))
    root, g = (
        np.asarray(x, np.float64).squeeze() for x in (factor.root, grads["linear"]["weight"])
    )
    assert root.shape == (4, 4)
    found = squared_norms(grads, state, tx=tx)["preconditioned/matrix"]
    # Two float32 sums of at most 24 terms, without significant cancellation.
    expected = np.trace(g @ root @ g.T) / np.trace(root) * 4
    np.testing.assert_allclose(found, expected, rtol=2 * 32 * UNIT)


OPTIMIZERS = {
    "shampoo": ravine.scale_by_shampoo(blocks=BLOCKS),
    "packed": ravine.scale_by_shampoo(blocks=BLOCKS, factors=ravine.Factors(packed=True)),
    "one side": ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4, sides="rows")),
    "soap": ravine.scale_by_soap(blocks=BLOCKS),
    "kl": ravine.scale_by_kl_shampoo(blocks=BLOCKS),
    "muon": ravine.scale_by_muon(),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trace_is_that_of_the_form(name):
    """The trace is the sum of the form over all unit matrices, here with padded blocks."""
    tx = OPTIMIZERS[name]
    state, _ = of(tx, {"kernel": (6, 5)})
    units = {"kernel": jnp.eye(30).reshape(30, 6, 5)}
    every = jax.jit(jax.vmap(lambda x: own_norms(tx, x, state)["kernel"]))(units)
    np.testing.assert_allclose(jnp.sum(every.square), every.trace[0], rtol=HALF)
    assert float(every.trace[0]) > 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, AxisType.Explicit) for name in OPTIMIZERS if name != "packed"),
        ("muon", AxisType.Auto),
        ("kl", AxisType.Auto),
    ],
)
def test_on_a_mesh_it_is_that_of_one_device(name, kind):
    tx = OPTIMIZERS[name]
    state, grads = of(tx, {"kernel": (2, 8, 16), "tall": (16, 8)})
    expected = norms(tx, grads, state)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"kernel": P(None, "x", "y"), "tall": P("y", None)}
    if kind == AxisType.Auto:
        tx = ravine.on_mesh(tx, specs, mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        grads = jax.device_put(grads, shardings)
        state = jax.device_put(state, ravine.state_shardings(tx, grads))
        found = norms(tx, grads, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=HALF), found, expected)


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (ravine.normuon(0.02), "Muon with a pre or a post"),
        (ravine.adamuon(0.02), "Muon with a pre or a post"),
        (ravine.soap_muon(0.01), "orthogonalize has no norm of its own"),
        (optax.chain(ravine.scale_by_soap(), ravine.scale_by_muon()), "both scale_by_soap and"),
    ],
    ids=["normuon", "adamuon", "soap_muon", "chain"],
)
def test_what_has_no_norm_is_refused_by_name(tx, words):
    grads = {"up": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda grads: squared_norms(grads, tx.init(grads), tx=tx), grads)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(with_noise_scale(tx).init, grads)
    state = jax.eval_shape(with_noise_scale(tx, preconditioned=False).init, grads)
    assert set(state.squares) == {"matrix"}


def test_a_state_of_another_optimizer_is_refused():
    tx, grads = ravine.muon(0.02), {"up": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="tx and opt_state together"):
        squared_norms(grads, ravine.sgd(0.1).init(grads))
    with pytest.raises(ValueError, match="opt_state has no state of scale_by_muon where tx has it"):
        squared_norms(grads, ravine.sgd(0.1).init(grads), tx=tx)
    momentum = ravine.scale_by_ema_momentum()  # on its own, this is not Muon
    assert set(squared_norms(grads, momentum.init(grads), tx=momentum)) == {"matrix"}


def test_hyperparameters_in_the_state_are_part_of_it():
    grads = grads_of({"up": {"kernel": (4, 6)}})
    tx = ravine.inject_hyperparams(ravine.kl_shampoo)(1e-3, eps=10.0)
    norm = norms(tx, grads, jax.jit(tx.init)(grads))["up/kernel"]
    # A sum of 24 squares in float32. Initially, the roots of all products of eigenvalues are 0.1 and the
    # bases are identities.
    expected = jnp.sum(jnp.square(grads["up"]["kernel"])) / 10.1
    np.testing.assert_allclose(norm.square, expected, rtol=2 * 32 * UNIT)
    tx = optax.inject_hyperparams(lambda eps: ravine.scale_by_kl_shampoo(eps=eps))(10.0)
    with pytest.raises(ValueError, match=r"ravine\.inject_hyperparams"):
        jax.eval_shape(lambda grads: own_norms(tx, grads, tx.init(grads)), grads)


def test_explain_is_the_same_when_the_noise_scale_is_measured():
    params = {"up": {"kernel": jnp.ones((4, 4))}}
    plain, measured = ravine.shampoo(1e-3), with_noise_scale(ravine.shampoo(1e-3))
    how = [ravine.explain(tx, params).rows[0].how for tx in (plain, measured)]
    assert how[0] == how[1]
