"""Shampoo, SOAP and KL-Shampoo against their authors' own code, step by step."""

import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.matrix.algebra.roots import CoupledNewton

from .golden import shampoo as golden

# The authors' roots: an absolute ridge, no certificate.
ROOTS = ravine.Roots(ridge=0.0, absolute_ridge=1e-8, tolerance=0.5)
META = {
    "b1": 0.9,
    "b2": 0.99,
    "refresh": ravine.Refresh(every=2, start=6),
    "blocks": ravine.Blocks(size=4),
    "roots": ROOTS,
    "graft": {"step": "none"},
}


def meta(weight_decay=0.0, **changes):
    direction = ravine.scale_by_shampoo(**{**META, **changes})
    return optax.chain(direction, ravine.add_decayed_weights(weight_decay))


OURS = {
    "meta_eigh": lambda: meta(),
    "meta_newton": lambda: meta(roots=dataclasses.replace(ROOTS, method=CoupledNewton())),
    "meta_adam_graft": lambda: meta(graft=ravine.Grafting(step="adam")),
    "meta_adamw": lambda: meta(graft=ravine.Grafting(step="adamw"), weight_decay=0.1),
    "meta_kl": lambda: meta(
        factors=ravine.Factors(statistics="kl"), roots=dataclasses.replace(ROOTS, exponent=-1 / 2)
    ),
    "meta_sum": lambda: meta(b2=1.0, graft=ravine.Grafting(step="adagrad")),
}


SOAP = {
    "soap": lambda: ravine.scale_by_soap(refresh=ravine.Refresh(every=3)),
    "soap_one_sided": lambda: ravine.scale_by_soap(
        refresh=ravine.Refresh(every=3),
        blocks=ravine.Blocks(size=None, bound=4),
        precondition_vectors=True,
    ),
}
KL = {
    "kl_shampoo": lambda balance: ravine.scale_by_kl_shampoo(
        refresh=ravine.Refresh(every=3), balance=balance
    ),
    # With such a small start, the bound on inverse roots takes effect.
    "kl_shampoo_clamped": lambda balance: ravine.scale_by_kl_shampoo(
        refresh=ravine.Refresh(every=3), balance=False, initial_eigenvalue=0.011
    ),
}


@cache
def goldens():
    return json.loads(Path(golden.__file__).with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", OURS)
def test_trajectory_equals_the_authors(case):
    check(case, OURS[case]())


@pytest.mark.parametrize("case", SOAP)
def test_soap_equals_the_authors(case):
    # They apply decay to the parameters after the step, except on the first step.
    check(case, SOAP[case](), lambda params, rate, at: (1 - 0.01 * rate * (at > 0)) * params)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("case", KL)
def test_kl_shampoo_equals_the_authors(case, balance):
    """All but the tensor "e" with three axes, where the authors' code mixes old and new values."""
    decayed = lambda params, rate, at: (1 - 0.01 * rate * (at > 0)) * params
    check(case, KL[case](balance), decayed, without=("e",))


def check(case, direction, afterwards=lambda params, rate, at: params, without=()):
    """Every recorded parameter is within 1e-4 of its leaf's largest change, plus its two last bits."""
    data = goldens()
    record = data["cases"][case]
    initial, gradients = golden.inputs(record["inputs"])
    rates = data["learning_rates"]
    params = jax.tree.map(jnp.asarray, initial)
    state = direction.init(params)
    step = jax.jit(direction.update)
    found = []
    for at in range(golden.STEPS):
        grads = {name: jnp.asarray(values[at]) for name, values in gradients.items()}
        updates, state = step(grads, state, params)
        moved = jax.tree.map(lambda p, u, rate=rates[at]: p - rate * u, params, updates)
        params = jax.tree.map(lambda p, at=at: afterwards(p, rates[at], at), moved)
        if at + 1 in golden.RECORDED:
            found.append(jax.tree.map(np.asarray, params))
    for name in set(record["parameters"]) - set(without):
        expected = golden.unpack(record["parameters"][name], initial[name])
        tolerance = 1e-4 * np.abs(expected - initial[name]).max() + 2.4e-7 * np.abs(expected).max()
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(ours[name] - theirs).max() <= tolerance, (name, case)


def test_inputs_are_those_of_the_golden_run():
    for name, digest in goldens()["sha256_of_inputs"].items():
        leaves = [values for part in golden.inputs(name) for values in part.values()]
        content = b"".join(values.astype("<f4").tobytes() for values in leaves)
        assert hashlib.sha256(content).hexdigest() == digest
