"""Muon and its descendants: the authors' trajectories, parameter assignment, and the single parts."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.matrix.algebra.polar import NewtonSchulz
from ravine.optimizers.matrix.shape.layout import MatrixAxes
from ravine.optimizers.roles import IN_OUT, Rule

from .golden import muon as golden
from .tolerances import HALF, UNIT, double, furthest

EVERYTHING = ((".*", "matrix", IN_OUT),)
# Five steps magnify the smallest singular values 485 times, and with them the rounding of two programs.
ROUNDING = 2 * 3.4445**5 * UNIT
BFLOAT16 = NewtonSchulz(dtype="bfloat16", form="standard")
# Each golden case with our builder. Sums (heavy ball) and means have the same directions.
BUILDERS = {
    "keller": functools.partial(ravine.muon, scale="keller"),
    "moonlight": functools.partial(ravine.muon, scale="moonlight"),
    "torch, original": functools.partial(ravine.muon, scale="keller"),
    "torch, match_rms_adamw": functools.partial(ravine.muon, scale="moonlight"),
    "normuon": functools.partial(ravine.normuon, b2=0.9),
    "adamuon": ravine.adamuon,
}


@functools.cache
def goldens():
    """Initial parameters and gradients, [out, in], and the recorded values."""
    data = json.loads(Path(golden.__file__).with_suffix(".json").read_text())
    initial, gradients = golden.inputs()
    for name, leaves in {"initial": initial, "gradients": gradients}.items():
        digest = hashlib.sha256(golden.flat(leaves).tobytes()).hexdigest()
        assert data["sha256_of_inputs"][name] == digest
    return initial, gradients, data


def recorded(case):
    """Results of the authors' code, [record, parameter]: in float32, and in bfloat16 as published."""
    initial, _, data = goldens()
    float32 = golden.unpack(data["cases"][case]["float32"], golden.flat(initial))
    return float32, golden.unpack(data["cases"][case]["bfloat16"], float32)


def with_epsilon(polar, epsilon):
    """`polar` of matrices divided by their norm plus this, like one more singular value."""

    def of(matrices):
        norms = jnp.linalg.norm(matrices, axis=(1, 2))
        wider = jnp.pad(matrices, ((0, 0), (0, 1), (0, 1)))
        wider = wider.at[:, -1, -1].set(jnp.sqrt(epsilon * (2 * norms + epsilon)))
        return polar(wider)[:, :-1, :-1]

    return of


def moved(polar, key, unit):
    """`polar` of matrices whose elements are moved by at most one unit in the last place."""

    def of(matrices):
        steps = jax.random.randint(key, matrices.shape, -1, 2).astype(matrices.dtype)
        return polar(matrices * (1 + 2 * unit * steps))

    return of


def trajectories(case, polar, unit):
    """Our trajectory, and three with this dtype's last places moved: [4, record, parameter]."""
    initial, gradients, data = goldens()
    rates = jnp.asarray(data["learning_rates"], jnp.float32)
    params = {name: jnp.asarray(leaf.T) for name, leaf in initial.items()}
    grads = {name: jnp.asarray(leaf.swapaxes(1, 2)) for name, leaf in gradients.items()}

    def run(key, unit):
        tx = BUILDERS[case](
            lambda count: rates[count],
            weight_decay=0.1,
            rules=EVERYTHING,
            polar=moved(polar, key, unit),
        )

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    units = unit * jnp.array([0.0, 1.0, 1.0, 1.0])
    every = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4), units)
    return np.stack(
        [
            [
                golden.flat({name: np.asarray(leaf[lane, t - 1]).T for name, leaf in every.items()})
                for t in data["recorded"]
            ]
            for lane in range(4)
        ]
    )


def check_parity(case, polar, unit, expected):
    """Allows eight times the change from moving the last places of what is orthogonalized.

    The two codes sum in a different order, and later steps magnify that in the same way.
    """
    found, *others = trajectories(case, polar, unit)
    assert furthest(found, expected) <= 8 * max(furthest(other, found) for other in others)


@pytest.mark.parametrize("case", BUILDERS)
def test_parity_in_float32(case):
    # With gradients as small as those of the tall matrix, the authors' epsilon matters.
    polar = with_epsilon(NewtonSchulz(), 1e-7) if case in ("keller", "normuon") else NewtonSchulz()
    check_parity(case, polar, UNIT, recorded(case)[0])


@pytest.mark.parametrize("case", BUILDERS)
def test_parity_in_bfloat16(case):
    check_parity(case, BFLOAT16, 2.0**-9, recorded(case)[1])


def test_norms_embedding_and_head_go_to_the_fallback():
    shapes = {
        "embed": {"embedding": (16, 8)},
        "layers": {"attention": {"query": {"kernel": (3, 8, 8)}}, "norm": {"scale": (3, 8)}},
        "head": {"kernel": (8, 16)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    params = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.array(np.float32(rng.normal(size=s)))
    tx = ravine.muon(0.02, weight_decay=0.1, fallback=ravine.Fallback(learning_rate=1e-3))
    other = ravine.adamw(1e-3, b2=0.95, weight_decay=0.1)
    states, steps = [x.init(params) for x in (tx, other)], [jax.jit(x.update) for x in (tx, other)]
    for _ in range(2):  # bias correction makes the first step the same for all decay rates
        grads = jax.tree.map(draw, shapes, is_leaf=is_shape)
        found = [step(grads, state, params) for step, state in zip(steps, states, strict=True)]
        (updates, expected), states = zip(*found, strict=True)
        # Moments, corrections (which a rate near one magnifies tenfold), root and quotient.
        others = lambda tree: [tree["embed"], tree["head"], tree["layers"]["norm"]]
        assert furthest(others(updates), others(expected)) <= 40 * UNIT
        kernel = lambda tree: tree["layers"]["attention"]["query"]["kernel"]
        assert jnp.max(jnp.abs(kernel(updates) - kernel(expected))) > 1e-3


def test_a_vector_called_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"(?s)(?=.*layer/bias)(?=.*\(3,\))"):
        ravine.muon(rules=EVERYTHING).init({"layer": {"bias": jnp.zeros(3)}})


def test_fallback_with_its_learning_rate_given_too_is_refused():
    with pytest.raises(
        ValueError, match=r"fallback\.learning_rate and fallback\.ratio are both given; drop one"
    ):
        ravine.muon(fallback={"learning_rate": 1e-3, "ratio": 0.1})


def draw(*shape, seed=0):
    return jnp.array(np.float32(np.random.default_rng(seed).normal(size=shape)))


def one_update(tx, grads, params=None):
    params = jax.tree.map(jnp.ones_like, grads) if params is None else params
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("name", ["muon", "normuon", "adamuon"])
def test_stacked_layers_equal_single_ones(name):
    tx, grads = getattr(ravine, name)(0.1, rules=EVERYTHING), draw(3, 8, 12)
    stacked = one_update(tx, {"kernel": grads})["kernel"]
    for layer in range(3):
        single = one_update(tx, {"kernel": grads[layer]})["kernel"]
        np.testing.assert_allclose(stacked[layer], single, atol=0.1 * ROUNDING)


def test_heads_equal_separate_matrices():
    grads = draw(8, 4, 6)  # input, heads, head width
    by_head = Rule(".*", "matrix", MatrixAxes((0,), (1, 2), column_parts=4))
    split = one_update(ravine.muon(0.1, rules=[by_head]), {"query": grads})["query"]
    alone = ravine.muon(0.1, rules=EVERYTHING)
    for head in range(4):
        single = one_update(alone, {"query": grads[:, head]})["query"]
        np.testing.assert_allclose(split[:, head], single, atol=0.1 * ROUNDING)


def test_cautious_decay_decays_where_update_and_parameter_agree():
    grads, params = draw(6, 8), draw(6, 8, seed=1)
    plain = one_update(ravine.muon(0.1, rules=EVERYTHING), [grads], [params])[0]
    cautious = ravine.muon(0.1, rules=EVERYTHING, weight_decay=0.5, cautious=True)
    found = one_update(cautious, [grads], [params])[0]
    expected = plain - 0.1 * 0.5 * jnp.where(plain * params <= 0, params, 0)
    np.testing.assert_allclose(found, expected, atol=0.1 * ROUNDING)


@pytest.mark.usefixtures("float64")
def test_fixed_norm_keeps_norms():
    tx = optax.chain(
        ravine.scale_by_muon(),
        ravine.scale_by_parameter_norm(),
        ravine.scale_by_learning_rate(0.3),
        ravine.keep_parameter_norm(),
    )
    params = start = double(draw(2, 6, 8))
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(10):
        updates, state = update(double(draw(2, 6, 8, seed=seed + 1)), state, params)
        params = params + updates
    norms = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))
    np.testing.assert_allclose(norms(params), norms(start), rtol=HALF)
    assert jnp.max(jnp.abs(params - start)) > 0.1
    # The norm at `init`, not the current one.
    updates, _ = update(updates, state, 2 * params)
    np.testing.assert_allclose(norms(2 * params + updates), norms(start), rtol=HALF)


@pytest.mark.usefixtures("float64")
def test_neuron_rms_keeps_the_frobenius_norm_and_evens_neurons_out():
    x = double(draw(6, 8))
    found = one_update(ravine.scale_by_neuron_rms(), x)
    np.testing.assert_allclose(jnp.linalg.norm(found), jnp.linalg.norm(x), rtol=HALF)
    neurons = jnp.linalg.norm(found, axis=0)
    np.testing.assert_allclose(neurons, jnp.full(8, neurons[0]), rtol=HALF)


@pytest.mark.usefixtures("float64")
def test_equilibrate_and_renormalize():
    x = double(draw(6, 8))
    columns = jnp.linalg.norm(one_update(ravine.equilibrate(), x), axis=0)
    np.testing.assert_allclose(columns, np.ones(8), rtol=HALF)
    rows = jnp.linalg.norm(one_update(ravine.equilibrate(neurons="in"), x), axis=1)
    np.testing.assert_allclose(rows, np.ones(6), rtol=HALF)
    muon_plus = one_update(ravine.renormalize(), x)
    np.testing.assert_allclose(jnp.linalg.norm(muon_plus), 6**0.5, rtol=HALF)
    ada = one_update(ravine.renormalize(0.2), x)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(ada))), 0.2, rtol=HALF)


def test_temporary_memory_is_bounded():
    params = [jnp.zeros((128, 512)) for _ in range(10)]
    tx = ravine.scale_by_muon()
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 3 * sum(p.nbytes for p in params)
