"""Every builder, every argument, every kind of bad value: it is refused by name, or it works.

The cases are generated from the signatures, so new arguments are covered too. Nothing is compiled here.
"""

import inspect
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine import schedules as s
from ravine import stability
from ravine.optimizers import registry
from ravine.optimizers.matrix.algebra.polar import NewtonSchulz

TX = optax.identity()
LINE = s.linear(1.0, 4)
ARRAY = jnp.ones((2, 3))
HEADS = jnp.ones((1, 2, 2, 4))
GUARD = stability.finite_gate(ravine.sgd(0.1))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """Names that `register` accepts here do not reach the tests of other files."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


# Required arguments, by name; by builder where a name has several meanings.
VALID = {
    "amount": 4,
    "base": ravine.sgd(0.1),
    "batch": s.BatchSizes((4,)),
    "batch_ratio": 2.0,
    "batch_size": 4,
    "beta": 0.9,
    "body": LINE,
    "boundaries": (2,),
    "by": 1,
    "cap": 1.0,
    "decay_rate": 0.5,
    "direction": TX,
    "context": 8,
    "decay": 0.9,
    "documents_BxT1": jnp.zeros((1, 3), int),
    "duration": 2,
    "end": 0.5,
    "eps": 1e-8,
    "every": 2,
    "examples": 80,
    "first_period": 2,
    "function": LINE,
    "gamma": 0.1,
    "grads": ARRAY,
    "half_life": 3.0,
    "hidden": ARRAY,
    "horizon": 10.0,
    "increment": 4,
    "keys_BxSxGxK": HEADS,
    "labels": jnp.zeros(2, int),
    "learning_rate": 0.1,
    "length": s.steps(10),
    "logits": ARRAY,
    "logits_BxHxTxS": HEADS,
    "logits_BxTxV": ARRAY[None],
    "logits_fn": LINE,
    "loss_fn": LINE,
    "magnitude": TX,
    "max_norm": 1.0,
    "optimizers": {"rest": TX},
    "opt_state": ravine.sgd(0.1).init(ARRAY),
    "params": ARRAY,
    "peak": 1.0,
    "period": 2,
    "period_factor": 2.0,
    "queries_BxTxHxK": HEADS,
    "radius": 1.0,
    "ratios": (0.5,),
    "rise_steps": 2,
    "schedule": LINE,
    "schedules": (LINE, LINE),
    "sizes": (4,),
    "start": 1.0,
    "step": 1,
    "steps": 8,
    "targets_BxT": jnp.zeros((1, 2), int),
    "text": "",
    "then": LINE,
    "threshold": 1.0,
    "tokens_per_step": 2,
    "tx": TX,
    "unembedding_DxV": jnp.ones((3, 4)),
    "unit": "steps",
    "value": 1.0,
    "values": jnp.ones(2),
    "values_BxSxGxK": HEADS,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "weights": (1.0,),
    "width_ratio": 2.0,
    "window": 2,
    "words": "a line",
    "x": ARRAY,
}
VALID_FOR = {
    "batch_ramp": {"start": 4, "end": 8},
    "combine_by_role": {
        "assignment": dict.fromkeys(get_args(ravine.optimizers.roles.Role), "rest")
    },
    "BatchSizes": {"boundaries": ()},
    "fused_cross_entropy": {"chunk": 4},
    "adamc_decay": {"learning_rate": LINE},
    "independent_decay": {"learning_rate": LINE},
    "for_run": {"name": "linear"},
    "parse_options": {"name": "linear"},
    "OptimizerConfig": {"name": "adamw"},
    "inject_hyperparams": {"builder": ravine.sgd},
    "register": {"name": "mine", "builder": ravine.sgd},
    "merge": {"checkpoints": [ARRAY]},
    "qk_clip": {"weights": {"q": stability.HeadWeights("query", 2)}},
    "HeadWeights": {"kind": "query", "heads": 2},
    "WidthRule": {"growth": lambda fan_in, fan_out: 1.0, "roles": None, "depth": 0.0},
    "width_rule": {"optimizer": "adam"},
    "scale_by_width": {"rule": "adam", "base": {"w": ARRAY}},
    "guarded_step": {"tx": GUARD, "state": GUARD.init(ARRAY)},
    "fraction": {"amount": 0.5},
    "seesaw": {"schedule": s.exponential(1.0, 8)},
    "merge_weights": {"decay": [0.5]},
    "on_mesh": {"param_specs": None},
    "momentum": {"start": 0.9, "peak": 0.8},
    "ramp": {"start": 0.1},
}
VALUES = {
    "a number as text": "1e-3",
    "no text": "",
    "an unknown word": "bf61",
    "bytes": b"x",
    "None": None,
    "an empty list": [],
    "a list": [0.5],
    "a mapping": {"a": 0.5},
    "NaN": float("nan"),
    "NumPy's NaN": np.float32("nan"),
    "JAX's NaN": jnp.float32("nan"),
    "infinity": float("inf"),
    "minus infinity": -np.inf,
    "true": True,
    "NumPy's true": np.True_,
    "complex": 1j,
    "an object": object(),
    "an array": np.ones(2),
    "a class": float,
    "negative": -1,
    "NumPy's negative": np.float32(-0.5),
    "JAX's negative": jnp.float32(-0.5),
    "large": 2**31 - 1,
    "past int32": 2**40,
    "huge": 1e38,
    "a fraction": 1.5,
    "zero": 0,
}
NOT_NUMBERS = set(VALUES) - {
    *("infinity", "minus infinity", "negative", "NumPy's negative", "JAX's negative"),
    *("large", "past int32", "huge", "a fraction", "zero"),
}
ARRAYS = {
    "JAX's NaN",
    "NumPy's NaN",
    "NumPy's true",
    "an array",
    "NumPy's negative",
    "JAX's negative",
}
# What error messages call an argument.
SAID = {
    "boundaries": "boundary",
    "checkpoints": "checkpoint",
    "interpolate": "interpolation",
    "name": "optimizer|schedule",
    "options": "option",
    "rule": "optimizer",
    "schedules": "schedule",
    "text": "option",
}
# Whether these are valid depends on the mesh, and JAX reports the error.
AXIS_NAMES = {"axis_name", "vocabulary_axis", "token_axes"}


def builders():
    for package in (ravine, s, stability):
        for name in package.__all__:
            thing = getattr(package, name)
            is_state = inspect.isclass(thing) and issubclass(thing, tuple)
            # Axes are checked when they are applied to a parameter, and the error gives its path
            # (tests/test_layout.py); `gathered` is called inside `shard_map`
            # (tests/test_noise_scale.py).
            is_elsewhere = name in ("MatrixAxes", "gathered")
            is_other = is_elsewhere or (is_state and name not in ("HeadWeights", "Stacked"))
            if callable(thing) and not is_other:
                yield name, thing
    yield "NewtonSchulz", NewtonSchulz


def refused(annotation: Any, name: str) -> set[str]:
    """The values that must be refused, derived from the annotation alone."""
    if annotation in (Any, optax.Params, inspect.Parameter.empty):
        return set(VALUES) - {"None", "a class"} if name.endswith("dtype") else set()
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return refused(inside[0], name)
    if origin in (Union, types.UnionType):
        if set(get_args(optax.Params)) <= set(inside):
            return set()
        # Where an annotation allows both an array and a number, the array is a number in an array.
        kinds = [each for each in inside if not (each is jax.Array and float in inside)]
        return set.intersection(*(refused(kind, name) for kind in kinds))
    if annotation is types.NoneType:
        return set(VALUES) - {"None"}
    if annotation is bool:
        return set(VALUES) - {"true", "NumPy's true"}
    if annotation is str:
        return set(VALUES) - {"a number as text", "no text", "an unknown word"}
    if annotation is float:
        return NOT_NUMBERS
    if annotation is int:
        return NOT_NUMBERS | {"infinity", "minus infinity", "a fraction", "huge"}
    if annotation is jax.Array:
        return {"a number as text", "no text", "bytes", "None", "an object", "a class", "a mapping"}
    if origin in (Sequence, tuple, Collection, Iterable):
        return set(VALUES) - {"an empty list", "a list", "an array", "a mapping"}
    if origin is Mapping:
        return set(VALUES) - {"a mapping"}
    return set(VALUES) if annotation is not typing.Any else set()


def valid_arguments(name, builder):
    own = VALID_FOR.get(name, {})
    return {
        p.name: {**VALID, **own}[p.name]
        for p in inspect.signature(builder).parameters.values()
        if p.name in own
        or (p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name in VALID)
    }


def cases(name, builder):
    """Every argument with every bad value, except those that only shapes or a mesh can reveal."""
    arguments = valid_arguments(name, builder)
    for p in inspect.signature(builder).parameters.values():
        bad = refused(p.annotation, p.name)
        for label, value in VALUES.items() if bad else ():
            takes_arrays = jax.Array in (p.annotation, *get_args(p.annotation))
            is_shape = label in ARRAYS and takes_arrays and float not in get_args(p.annotation)
            if is_shape or (p.name in AXIS_NAMES and isinstance(value, str)):
                continue
            if p.kind is p.VAR_POSITIONAL:
                yield p.name, label, (value,), arguments, label in bad
            else:
                first = (LINE,) if builder is s.plot else ()
                yield p.name, label, first, {**arguments, p.name: value}, label in bad


BUILDERS = list(builders())


@pytest.mark.parametrize(("name", "builder"), BUILDERS, ids=[name for name, _ in BUILDERS])
def test_every_bad_argument_of_a_builder_is_refused_by_its_name(name, builder):
    wrong = []
    for argument, label, args, kwargs, is_bad in cases(name, builder):
        outcome = None
        try:
            found = builder(*args, **kwargs)
            if is_bad:
                outcome = "accepted"
            elif isinstance(found, s.Schedule) and label != "huge":
                values = found(np.arange(9))
                outcome = None if np.isfinite(values).all() else f"gives {values}"
        except (ValueError, TypeError) as error:
            if not re.search(rf"\b({argument}|{SAID.get(argument, argument)})", str(error)):
                outcome = f"does not name it: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome:
            wrong.append(f"{name}({argument}={label}) {outcome}")
    assert not wrong, "\n".join(wrong)


def test_there_are_as_many_cases_as_ever():
    assert sum(1 for name, builder in BUILDERS for _ in cases(name, builder)) > 15_000
