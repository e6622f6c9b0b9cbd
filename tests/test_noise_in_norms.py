"""The noise scale in the norms of Muon, Shampoo and SOAP, checked against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.stability import MicroBatches, squared_norms
from ravine.stability.noise_scale import _estimates

from .standard_errors import of_noise_scale
from .tolerances import UNIT

ROWS, COLUMNS = 4, 6
MEAN = np.outer(np.linspace(0.2, 1.0, ROWS), np.linspace(1.0, -0.5, COLUMNS)) + 0.1 * np.eye(4, 6)
DEVIATIONS = np.outer(np.arange(1, ROWS + 1) ** -0.5, np.linspace(0.5, 1.5, COLUMNS))


def polar_norm(state):
    """P from Muon's state before a step, in float64: the inverse root of the momentum's Gram matrix."""
    (mu,) = jax.tree.leaves(optax.tree.get(state, "mu"))
    mu = np.asarray(mu, np.float64)
    values, vectors = np.linalg.eigh(mu @ mu.T)
    return np.kron((vectors * values**-0.5) @ vectors.T, np.eye(COLUMNS))


def roots_norm(state):
    """P from Shampoo's state: Kronecker products of the roots of its six 2 x 2 blocks."""
    (factors,) = optax.tree.get(state, "factors")["kernel"]
    left, right = (np.asarray(x.root, np.float64).reshape(2, 3, 2, 2) for x in factors)
    whole = np.zeros((ROWS, COLUMNS, ROWS, COLUMNS))
    for i, j in np.ndindex(2, 3):
        rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
        block = np.einsum("ab,cd->acbd", left[i, j], right[i, j])
        whole[rows, columns, rows, columns] = block
    return whole.reshape(ROWS * COLUMNS, -1)


def basis_norm(state):
    """P from SOAP's state, for one block: 1 / sqrt(v) in the eigenbasis."""
    (axes,) = optax.tree.get(state, "bases")["kernel"]
    (nu,) = optax.tree.get(state, "nu")["kernel"]
    left, right = (np.asarray(x.vectors, np.float64).squeeze() for x in axes)
    turned = np.kron(left.T, right.T)
    return turned.T @ (np.asarray(nu, np.float64).reshape(-1, 1) ** -0.5 * turned)


# How much float32 rounding is magnified, given the condition number of P: by that times the number of
# terms in the quadratic form, and for the root of Muon's Gram matrix by its square times the number of
# terms in an element.
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
    """The gradient of a quadratic is H theta plus noise of known covariance.

    The optimizer learns for some steps, and then its state is frozen so that the norm does not change.
    2,000 steps of 4 micro-batches of 8 are within five standard errors.
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
    values, vectors = np.linalg.eigh((p + p.T) / 2)
    root = (vectors * values**0.5) @ vectors.T
    covariance = root * DEVIATIONS.ravel() ** 2 @ root
    error = of_noise_scale(root @ MEAN.ravel(), covariance, 32, 4, 2000)
    assert float(trace.mean() / square.mean()) == pytest.approx(expected, rel=5 * error)
    plain = np.sum(DEVIATIONS**2) / np.sum(MEAN**2)
    assert abs(expected / plain - 1) > 0.25  # a different number
    trace_of = np.trace(p) / p.shape[0]
    found = squared_norms(params, state, tx=tx)["preconditioned/matrix"]
    bound = roundings(np.linalg.cond(p)) * UNIT
    assert float(found) == pytest.approx(MEAN.ravel() @ p @ MEAN.ravel() / trace_of, rel=bound)
