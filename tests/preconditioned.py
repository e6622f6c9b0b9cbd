"""Helpers shared by the tests of optimizers with Kronecker factors, on one device and on meshes."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import ravine
from jax.sharding import PartitionSpec as P
from ravine.optimizers.roles import IN_OUT

from .arrays import single

# The same options return the same transformation, so it is compiled once.
shampoo = functools.cache(ravine.scale_by_shampoo)
soap = functools.cache(ravine.scale_by_soap)


def normal(shape, seed=0, count=None, scale=1.0) -> Any:
    """A standard normal array, or a list of them."""
    rng = np.random.default_rng(seed)
    made = [single(scale * rng.normal(size=shape)) for _ in range(count or 1)]
    return made if count else made[0]


def conditioned(n, seed, low=0.5, high=2.0):
    """A square matrix with singular values in the given range."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    return (left * np.geomspace(low, high, n)) @ right


def run(tx, gradients, params=None):
    """All updates and the state after each; parameters, if given, are updated too."""
    given = params is not None
    params = params if given else jax.tree.map(np.zeros_like, gradients[0])
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    updates, states = [], []
    for gradient in gradients:
        update, state = step(gradient, state, params)
        if given:
            params = optax.apply_updates(params, update)
        updates.append(update)
        states.append(state)
    return updates, states


def factors(state):
    """All factors, in the order of leaves."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "residual"))
    return [leaf for leaf in leaves if hasattr(leaf, "residual")]


def all_finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def assert_trees_close(found, expected, tolerance):
    """Compares trees, relative to the largest element of each leaf."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference = np.max(np.abs(a - b))
        assert difference <= tolerance * np.max(np.abs(b)), difference


def refreshed_roots(before, after):
    """One flag per root: whether it differs."""
    return np.concatenate(
        [
            np.any(np.asarray(a.root != b.root), axis=(-1, -2)).ravel()
            for a, b in zip(factors(before), factors(after), strict=True)
        ]
    )


# Stacked kernels of experts, and the shardings that leave each matrix on one device.
EXPERTS = {"layers-experts": (2, 8, 4, 8), "experts-layers": (8, 3, 4, 8), "stages": (2, 4, 8, 4)}
EXPERTS_ALONE = {
    "layers-experts": P(None, ("x", "y")),
    "experts-layers": P(("x", "y")),
    "stages": P("y", "x"),
}


def on_matrices(name):
    """Our optimizer of this name, for leaves whose last two axes are matrices."""
    makers = {
        "shampoo": ravine.scale_by_shampoo,
        "soap": ravine.scale_by_soap,
        "kl_shampoo": ravine.scale_by_kl_shampoo,
    }
    if name == "muon":
        return ravine.scale_by_muon(scale="moonlight")
    return makers[name](refresh=ravine.Refresh(every=2), axes=lambda path: IN_OUT)
