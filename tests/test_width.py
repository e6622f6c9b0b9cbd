"""Rules for width and depth: their arithmetic, and equal changes of activations at every size."""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.links.growth import count
from ravine.optimizers.roles import decide
from ravine.optimizers.width import ELEMENTS, GRADIENT, POLAR
from ravine.training.model import ModelConfig
from ravine.training.width.command import CoordinateConfig
from ravine.training.width.coordinates import UPDATES, at_depth, at_width, changes, slope

M = 4
WORDS = 32


def tree(width):
    """The shapes of a model: a hidden matrix, an embedding, a head and a gain."""
    return {
        "embed": {"embedding": jnp.zeros((WORDS, width))},
        "dense": {"kernel": jnp.zeros((width, width))},
        "head": {"kernel": jnp.zeros((width, WORDS))},
        "norm": {"scale": jnp.zeros(width)},
    }


def factors(rule, depth_ratio=1.0):
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree(16))]
    found = decide(tree(16 * M))
    return {
        one.role: rule.factor(one, base, depth_ratio)
        for one, base in zip(found, shapes, strict=True)
    }


# (optimizer, hyperparameters, rank): hidden, embedding, head, gain. The first five, and Shampoo and SOAP
# in the limit "low", are the result of the authors' `assign_lr` for d_in and d_out relative to the base.
CASES = {
    ("adamw", "", "low"): (1 / M, 1, 1 / M, 1),
    ("lion", "", "low"): (1 / M, 1, 1 / M, 1),
    ("sgd", "", "low"): (1, M, 1 / M, M),
    ("muon", "spectral", "low"): (1, 1, 1 / M, 1),
    ("muon", "none", "low"): (1, 1, 1 / M, 1),
    ("muon", "keller", "low"): (1, 1, 1 / M, 1),
    ("muon", "moonlight", "low"): (M**-0.5, 1, 1 / M, 1),
    ("shampoo", "adam", "low"): (1 / M, 1, 1 / M, 1),
    ("shampoo", "adam", None): (1 / M, 1, 1 / M, 1),  # the authors' default
    ("shampoo", "adam", "full"): (M**-0.5, 1, 2**-0.5 / M**0.5, 1),
    ("shampoo", "none", "full"): (1, 2**0.5, M**-0.5, 1),
    ("shampoo", "none", "low"): (1, M**0.5, M**-0.5, 1),
    ("soap", "", "low"): (1, M**0.5, M**-0.5, 1),
    ("soap", "", "full"): (M**-0.5, 1, M**-0.5 * (4 + WORDS**0.5) / (8 + WORDS**0.5), 1),
    ("kl_shampoo", "", "low"): (M**-0.5, 1, M**-0.75, 1),
}


@pytest.mark.parametrize(("name", "own", "rank"), CASES, ids=lambda value: str(value))
def test_the_table_of_the_rule(name, own, rank):
    given = {"muon": {"scale": own}, "shampoo": {"graft": {"step": own}}}.get(name, {})
    found = factors(ravine.width_rule(ravine.OptimizerConfig(name, given), rank=rank))
    hidden, embedding, head, gain = CASES[name, own, rank]
    wanted = {"matrix": hidden, "embedding": embedding, "head": head, "norm": gain}
    assert {role: found[role] for role in wanted} == pytest.approx(wanted)


def test_every_optimizer_has_a_rule_and_at_the_base_width_it_changes_nothing():
    for name in ravine.names():
        rule = ravine.width_rule(name)
        for found in decide(tree(16)):
            assert rule.factor(found, found.shape) == pytest.approx(1)
    assert not set(GRADIENT) & set(ELEMENTS) | set(POLAR) & set(ELEMENTS)


def test_blocks_and_sides():
    cut = lambda blocks, **more: ravine.OptimizerConfig("soap", {"blocks": blocks, **more})
    low = functools.partial(ravine.width_rule, rank="low")
    # Blocks of 16 at both widths: 16 times as many blocks, so a quarter of the rate.
    assert factors(low(cut({"size": 16})))["matrix"] == pytest.approx(1 / M)
    # No axis is short enough for a basis, so this is Adam.
    assert factors(low(cut({"size": None, "bound": 4}))) == pytest.approx(
        factors(ravine.width_rule("adamw"))
    )
    plain = {"graft": {"step": "none"}, "blocks": {"size": 16}}
    shampoo = ravine.width_rule(ravine.OptimizerConfig("shampoo", plain))
    assert factors(shampoo)["matrix"] == pytest.approx(1 / M)  # n^-1/2 with exponents of -1/4
    halves = ravine.OptimizerConfig(
        "shampoo", {"graft": {"step": "none"}, "roots": {"exponent": -0.5}}
    )
    assert factors(ravine.width_rule(halves), 2.0)["matrix"] == pytest.approx(
        1 / 2
    )  # L^(1 - 2E), E = 1
    assert (count(33, 16, 100), count(33, None, 100), count(200, 16, 100)) == (3, 1, 1)


def test_depth_multiplies_matrices_of_layers_only():
    sgd = factors(ravine.width_rule("sgd"), depth_ratio=2.0)
    assert (sgd["matrix"], sgd["head"], sgd["norm"]) == pytest.approx((2, 1 / M, M))
    assert factors(ravine.width_rule("adamw"), 2.0) == factors(ravine.width_rule("adamw"))


def test_the_link_multiplies_updates_and_explains_itself():
    tx = optax.chain(ravine.sgd(1.0), ravine.scale_by_width("adamw", tree(16)))
    params = jax.tree.map(jnp.ones_like, tree(16 * M))
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates["dense"]["kernel"][0, 0]) == -0.25
    assert float(updates["embed"]["embedding"][0, 0]) == -1
    told = str(ravine.explain(ravine.scale_by_width("adamw", tree(16)), params))
    assert "times 0.25 for its width" in told


def test_stacked_layers_may_be_more_than_in_the_base_model():
    stacked = lambda layers, width: {"dense": {"kernel": jnp.ones((layers, width, width))}}
    rules = [ravine.Rule("kernel$", "matrix", ravine.MatrixAxes((-2,), (-1,)))]
    tx = ravine.scale_by_width("adamw", stacked(2, 4), rules=rules)
    params = stacked(6, 8)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["dense"]["kernel"], 0.5)


def test_bad_input():
    other = {"dense": {"kernel": jnp.zeros((4, 4))}}
    with pytest.raises(ValueError, match="base model has no parameter 'dense/weight' with 2 axes"):
        ravine.scale_by_width("adamw", other).init({"dense": {"weight": jnp.zeros((4, 4))}})
    with pytest.raises(ValueError, match="depth_ratio must be positive"):
        ravine.scale_by_width("adamw", other, depth_ratio=0.0)
    with pytest.raises(ValueError, match="unknown optimizer 'adamm'"):
        ravine.scale_by_width("adamm", other)
    with pytest.raises(ValueError, match="width 72 must be a multiple"):
        at_width(ModelConfig(width=64, heads=4), 72)


SMALL = ModelConfig(width=16, layers=1, heads=1, context=16, feed_forward=48)
WIDTHS = (16, 64)


OWN = {"muon": (("scale", "moonlight"),)}


def text():
    """Two batches of real text: noise that fills a whole matrix follows another rule than text."""
    letters = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(7).integers(0, len(letters) - 17, (2, 16))
    return jnp.asarray(letters[starts[..., None] + np.arange(17)])


def slopes(name, learning_rate, sizes):
    """The power of the size in the change of every activation, with and without the rule.

    Sizes are widths or numbers of layers, with the arguments that `changes` takes for each.
    """
    config = ravine.OptimizerConfig(name, dict(OWN.get(name, ())))
    found = {False: {}, True: {}}
    for key, more in sizes.items():
        for ruled, row in changes(config, learning_rate, SMALL, batches=text(), **more).items():
            for activation, change in row.items():
                found[ruled].setdefault(activation, {})[key] = change
    return [
        {activation: slope(by_size) for activation, by_size in found[ruled].items()}
        for ruled in (False, True)
    ]


# Rules are half powers of the width, so a slope nearer to zero than to the next rule confirms the rule.
QUARTER = 1 / 4
# The power of the width by which a matrix's rate falls.
POWERS = {"adamw": 1, "muon": 1 / 2, "soap": 1 / 2, "shampoo": 1}


@pytest.mark.parametrize(
    "name",
    ["adamw", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("shampoo", "soap"))],
)
def test_activations_change_as_much_at_every_width(name):
    without, ruled = slopes(name, 1e-3, {width: {"width": width} for width in WIDTHS})
    assert abs(without[UPDATES] - ruled[UPDATES] - POWERS[name]) < QUARTER
    for activation in ("layer 1", "logits", UPDATES):
        if name != "shampoo":  # it is overcorrected at such small widths (docs/width.md)
            assert abs(ruled[activation]) < QUARTER, activation
        assert abs(ruled[activation]) < abs(without[activation]), activation


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [
        ("adamw", 1e-3),
        *(
            pytest.param(name, rate, marks=pytest.mark.slow)
            for name, rate in (("sgd", 0.03), ("shampoo", 1e-3), ("soap", 1e-3))
        ),
    ],
)
def test_activations_change_as_much_at_every_depth(name, learning_rate):
    depths = {layers: {"width": 16, "layers": layers} for layers in (1, 4)}
    without, ruled = slopes(name, learning_rate, depths)
    assert without["layer 1"] > QUARTER  # the base model's only layer ends here
    assert abs(ruled["layer 1"]) < QUARTER
    assert abs(ruled[UPDATES]) < QUARTER


def test_branches_are_scaled_for_their_number_and_the_base_model_is_what_it_was():
    base = ModelConfig(width=16, layers=2, heads=1)
    deep = at_depth(base, 6)
    assert (deep.layers, deep.branch_scale) == (6, pytest.approx(1 / 3))
    assert at_depth(base, 2) == base
    with pytest.raises(ValueError, match="3 layers must be a multiple of the base model's 2"):
        at_depth(base, 3)
    with pytest.raises(ValueError, match="branch_scale must be positive and finite, got 0"):
        ModelConfig(branch_scale=0.0)
    with pytest.raises(ValueError, match="depths must be two or more that rise"):
        CoordinateConfig(depths=(4, 2))
    with pytest.raises(ValueError, match="widths or depths are compared, not both"):
        CoordinateConfig(depths=(2, 4), widths=(16, 32))
    assert CoordinateConfig(depths=(2, 4)).sizes == (2, 4)
