"""Configurations by name: JSON round trips, duplicates, refusals."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import ravine


@pytest.mark.parametrize("name", ravine.names())
def test_every_name_makes_a_round_trip(name):
    config = ravine.OptimizerConfig(name)
    assert ravine.OptimizerConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"b2": 0.95, "mu_dtype": jnp.bfloat16},
        {"nu_dtype": "float32", "mu_dtype": jnp.dtype("bfloat16")},
        {"weight_decay_form": "cautious", "weight_decay": 0.1},
        {"weight_decay_mask": [True, [False, True]]},
    ],
)
def test_values_survive_json_and_are_hashable(hyperparameters):
    config = ravine.OptimizerConfig("adamw", hyperparameters)
    again = ravine.OptimizerConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)


def test_a_configuration_builds_what_it_says_and_is_frozen():
    config = ravine.OptimizerConfig("adamw", {"mu_dtype": jnp.bfloat16})
    state = config.build(1e-3).init({"w": jnp.ones(2)})
    assert state[0].mu["w"].dtype == jnp.bfloat16
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "adam"


def test_faults():
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'; did you mean"):
        ravine.OptimizerConfig("adamv")
    with pytest.raises(ValueError, match="adamw has no hyperparameter 'beta1'"):
        ravine.OptimizerConfig("adamw", {"beta1": 0.9})
    with pytest.raises(ValueError, match="registered already"):
        ravine.register("adan", ravine.adan)
    with pytest.raises(ValueError, match="must be learning_rate"):
        ravine.register("scale_by_adan", ravine.scale_by_adan)
    with pytest.raises(ValueError, match="name and hyperparameters"):
        ravine.OptimizerConfig.from_json('{"name": "adamw"}')
    scheduled = ravine.OptimizerConfig("adamw", {"weight_decay": lambda count: 0.1})
    with pytest.raises(TypeError, match=r"weight_decay=.*has no JSON"):
        scheduled.to_json()


@pytest.mark.parametrize(
    ("build", "old", "new"),
    [
        (ravine.muon, "matrix_roles", r"muon has no argument 'matrix_roles'; give roles="),
        (ravine.scale_by_muon, "method", "'method'; give polar="),
        (ravine.shampoo, "method", r"'method'; give roots=ravine\.Roots\(method="),
        (ravine.soap, "soap_roles", "give roles="),
        (ravine.shampoo, "graft_eps", "give eps="),
        (ravine.shampoo, "packed", r"give factors=ravine\.Factors\(packed="),
        (ravine.shampoo, "every", r"give refresh=ravine\.Refresh\(every="),
        (ravine.scale_by_soap, "limit", r"give blocks=ravine\.Blocks\(bound="),
        (ravine.muon, "fallback_learning_rate", r"give fallback=ravine\.Fallback\("),
        (ravine.Refresh, "evry", r"Refresh has no argument 'evry'; did you mean every"),
        (ravine.adamw, "lr", "give learning_rate="),
        (ravine.adamw, "betas", r"give b1=\.\.\. and b2="),
        (ravine.muon, "betas", "known: learning_rate"),
        (ravine.muon, "momentum", "give b1="),
        (ravine.muon, "ns_steps", r"give polar=ravine\.NewtonSchulz\(steps="),
        (ravine.muon, "adam_learning_rate", r"give fallback=ravine\.Fallback\(learning_rate="),
        (ravine.soap, "precondition_frequency", r"give refresh=ravine\.Refresh\(every="),
        (ravine.shampoo, "block_size", r"give blocks=ravine\.Blocks\(size="),
        (ravine.rmsprop, "decay", r"give b2=\.\.\."),
        (ravine.rmsprop, "alpha", r"give b2=\.\.\."),
        (ravine.sgd, "accumulator_dtype", "give mu_dtype="),
        (ravine.sophia_h, "gamma", r"give rho=\.\.\."),
        (ravine.muon, "adam_b1", r"give fallback=ravine\.Fallback\(b1="),
        (ravine.muon, "consistent_rms", 'give scale="moonlight"'),
        (ravine.muon, "muon_weight_dimension_numbers", "give rules="),
        (ravine.shampoo, "start_preconditioning_step", r"give refresh=ravine\.Refresh\(start="),
        (
            ravine.schedule_free_adamw,
            "warmup_steps",
            r"give learning_rate=ravine\.schedules\.warmup",
        ),
        (ravine.adamw, "weight_deacy", r"did you mean weight_decay( or \w+)*\?"),
    ],
)
def test_an_old_foreign_or_misspelt_name_is_refused_with_the_right_one(build, old, new):
    with pytest.raises(TypeError, match=new):
        build(**{old: 1})


def test_options_make_a_round_trip_and_are_the_same_as_a_mapping():
    config = ravine.OptimizerConfig(
        "shampoo",
        {
            "refresh": ravine.Refresh(every=20, staggered=True),
            "blocks": {"size": None, "sides": "rows"},
            "fallback": ravine.Fallback(ratio=0.1, b2=0.99),
        },
    )
    assert config.value("blocks") == ravine.Blocks(size=None, sides="rows")
    read = ravine.OptimizerConfig.from_json(config.to_json())
    assert read == config
    assert hash(read) == hash(config)
    assert '"refresh": {"every": 20, "staggered": true}' in config.to_json()
    read.build(1e-3)


@pytest.mark.parametrize(
    ("hyperparameters", "words"),
    [
        ({"refresh": {"every": 0}}, r"refresh\.every must be a whole number of at least 1"),
        ({"refresh": {"evry": 5}}, r"refresh must be .*did you mean every"),
        ({"blocks": {"sides": "left"}}, r"blocks\.sides must be one of"),
        ({"fallback": {"b2": 1.5}}, r"fallback\.b2 must lie in \[0, 1\)"),
        ({"fallback": {"learning_rate": "x"}}, r"fallback\.learning_rate must be a finite number"),
        ({"refresh": {"start": 5}}, r"refresh\.start must be a step from 10"),
    ],
)
def test_bad_values_within_options_are_refused_by_their_names(hyperparameters, words):
    for refuse in (
        lambda: ravine.OptimizerConfig("shampoo", hyperparameters),
        lambda: ravine.shampoo(1e-3, **hyperparameters),
    ):
        with pytest.raises(ValueError, match=words):
            refuse()


def test_options_stay_as_they_are_where_numbers_are_injected():
    refresh = ravine.Refresh(every=2)
    tx = ravine.inject_hyperparams(ravine.shampoo)(1e-3, refresh=refresh, rules=[("", "matrix")])
    state = tx.init({"kernel": jnp.ones((2, 3))})
    assert {"b1", "b2", "learning_rate", "weight_decay"} <= set(state.hyperparams)
    assert not {"refresh", "blocks", "fallback"} & set(state.hyperparams)


def test_a_builder_with_some_arguments_given_is_injected_too():
    build = functools.partial(ravine.shampoo, b1=0.8, rules=[("", "matrix")])
    tx = ravine.inject_hyperparams(build)(learning_rate=1e-3)
    assert float(tx.init({"kernel": jnp.ones((2, 3))}).hyperparams["b1"]) == np.float32(0.8)


def test_dtypes_inside_options_survive_json():
    config = ravine.OptimizerConfig("shampoo", {"factors": ravine.Factors(root_dtype=jnp.bfloat16)})
    assert ravine.OptimizerConfig.from_json(config.to_json()) == config
