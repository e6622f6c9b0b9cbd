"""Every optimizer in one row each: what the common tests need to know about it."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ravine
from ravine.optimizers.roles import IN_OUT


def builder(name: str):
    """Our builder of this name; Sophia gets the curvature of the sum of squares at every update."""
    build = getattr(ravine, name)
    if not name.startswith("sophia"):
        return build

    def curvature(params, key):
        del key
        return jax.tree.map(lambda p: jnp.full_like(p, 2.0), params)

    @functools.wraps(build)
    def with_curvature(*args, **kwargs):
        tx = build(*args, **kwargs)
        update = functools.partial(tx.update, curvature=curvature)
        return optax.GradientTransformationExtraArgs(tx.init, update)

    return with_curvature


# Leading axes are batches of matrices.
ALL_MATRICES = ((".*", "matrix", IN_OUT),)


@dataclasses.dataclass(frozen=True)
class Row:
    """A registered optimizer with some hyperparameters."""

    name: str
    # Solves the small problems when it decays linearly to zero over `steps`.
    learning_rate: float
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    steps: int = 300
    # A constant rate, as Optax's own tests require, for instance for Rosenbrock's function.
    constant_learning_rate: float = 1e-2
    # Accepts only leaves with two or more axes: the tests leave out vectors and scalars.
    needs_matrices: bool = False
    # Replaces non-finite gradients by zeros, block by block.
    survives_nan: bool = False
    # Averages its iterates, so parameters move even when the learning rate is zero.
    averages: bool = False

    @property
    def label(self) -> str:
        return "-".join([self.name, *self.hyperparameters])

    @property
    def builder(self):
        return builder(self.name)

    def accepts(self, argument: str) -> bool:
        return argument in inspect.signature(self.builder).parameters

    def build(self, learning_rate: Any = None, **overrides: Any) -> optax.GradientTransformation:
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.builder(rate, **{**self.hyperparameters, **overrides})

    def without_decay(self, learning_rate: Any = None) -> optax.GradientTransformation:
        no_decay = {"weight_decay": 0.0} if self.accepts("weight_decay") else {}
        return self.build(learning_rate, **no_decay)

    def tree(self, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        """Parameters, or gradients when given another seed."""
        shapes = {"first": (4, 8), "second": (8, 4)}
        if not self.needs_matrices:
            shapes |= {"vector": (8,), "scalar": ()}
        if self.survives_nan:
            # Square, because the basis is arbitrary in directions where gradients have no component.
            shapes = {"first": (4, 4), "second": (5, 5)}
        if self.needs_matrices:
            shapes |= {"stack": (4, 3, 3) if self.survives_nan else (4, 3, 5)}
        shapes |= {"empty": (0, 3)}
        rng = np.random.default_rng(seed)
        return {
            k: jnp.array(np.asarray(rng.normal(size=shape), dtype)) for k, shape in shapes.items()
        }


def matrices(name: str, learning_rate: float, hyperparameters: Any = (), **fields: Any) -> Row:
    """A row for an optimizer of the Muon family, with all parameters as matrices."""
    return Row(
        name,
        learning_rate,
        {"rules": ALL_MATRICES, **dict(hyperparameters)},
        needs_matrices=True,
        **fields,
    )


def preconditioned(name: str, learning_rate: float, hyperparameters: Any, **fields: Any) -> Row:
    """A row for an optimizer with Kronecker factors, with all parameters as matrices."""
    return matrices(
        name,
        learning_rate,
        hyperparameters,
        survives_nan=True,
        **fields,
    )


TABLE = (
    Row("sgd", 0.1, constant_learning_rate=1e-3),
    Row("sgd", 0.05, {"momentum": 0.9, "nesterov": True}, constant_learning_rate=1e-3),
    Row(
        "sgd",
        0.05,
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-3},
        constant_learning_rate=1e-3,
    ),
    Row("adagrad", 1.0, constant_learning_rate=1.0),
    Row("rmsprop", 0.1, constant_learning_rate=5e-3),
    Row("rmsprop", 0.02, {"centered": True, "momentum": 0.9}, constant_learning_rate=1e-3),
    Row("adam", 0.2),
    Row("adamw", 0.2),
    Row("nadam", 0.2),
    Row("nadamw", 0.2),
    Row("lion", 0.1, {"weight_decay": 1e-3}, constant_learning_rate=1e-3),
    Row("adan", 0.1, {"weight_decay": 1e-3}, steps=1000, constant_learning_rate=1e-3),
    Row(
        "adan",
        0.1,
        {"weight_decay": 1e-3, "no_prox": True},
        steps=1000,
        constant_learning_rate=1e-3,
    ),
    Row("ademamix", 0.2, {"b3": 0.99}, constant_learning_rate=1e-3),
    Row("mars", 0.2, {"rules": ALL_MATRICES}),
    Row(
        "sophia_g",
        0.1,
        {"start": 0, "rho": 1.0, "b2": 0.875, "weight_decay": 1e-3},
        steps=1000,
        constant_learning_rate=1e-3,
    ),
    Row(
        "sophia_h",
        0.1,
        {"rho": 1.0, "b2": 0.875, "correct_bias": True, "weight_decay": 1e-3},
        steps=1000,
        constant_learning_rate=1e-3,
    ),
    Row("cautious_adamw", 0.2),
    Row("cautious_lion", 0.1, {"weight_decay": 1e-3}, constant_learning_rate=1e-3),
    Row(
        "schedule_free_sgd", 0.2, {"weight_power": 2.0}, constant_learning_rate=1e-3, averages=True
    ),
    Row("schedule_free_adamw", 0.2, {"weight_power": 2.0}, averages=True),
    matrices("muon", 0.1),
    matrices("muon", 0.2, {"scale": "moonlight", "nesterov": False}, steps=1000),
    matrices("normuon", 0.1),
    matrices("adamuon", 0.3),
    # float32 represents this b2 exactly, because `optax.inject_hyperparams` makes it an array.
    preconditioned("shampoo", 0.1, {"refresh": ravine.Refresh(every=2), "b2": 0.96875}),
    preconditioned(
        "shampoo",
        1.0,
        {
            "refresh": ravine.Refresh(every=3, staggered=True),
            "blocks": ravine.Blocks(size=3),
            "b2": 1.0,
            "graft": {"step": "adagrad"},
        },
        constant_learning_rate=1.0,
    ),
    preconditioned(
        "shampoo",
        0.1,
        {
            "refresh": ravine.Refresh(every=2),
            "factors": ravine.Factors(statistics="kl", packed=True),
            "b2": 0.96875,
        },
    ),
    # float32 represents these decay rates exactly, too. A gradient that never changes is diagonal in its
    # own eigenbasis up to rounding, and with a tiny eps SOAP would divide that rounding by its own size.
    preconditioned(
        "soap", 0.1, {"refresh": ravine.Refresh(every=2), "eps": 1e-2, "b1": 0.9375, "b2": 0.9375}
    ),
    preconditioned(
        "soap",
        0.1,
        {
            "refresh": ravine.Refresh(every=3, staggered=True),
            "blocks": ravine.Blocks(size=3, sides="smaller"),
            "eps": 1e-2,
            "b1": 0.9375,
            "b2": 0.9375,
        },
    ),
    preconditioned(
        "soap_muon",
        0.1,
        {"refresh": ravine.Refresh(every=2), "eps": 1e-2, "b1": 0.9375, "b2": 0.9375},
        steps=1000,
    ),
    preconditioned("kl_shampoo", 0.1, {"refresh": ravine.Refresh(every=2)}),
)
_NAMES = [row.name for row in TABLE]
# Further settings of a matrix optimizer. Wrapping these and injecting their hyperparameters are tested
# only in the slow tests.
VARIANTS = frozenset(
    row for at, row in enumerate(TABLE) if row.needs_matrices and row.name in _NAMES[:at]
)
# One cheap row for each family: elementwise moments, averages, curvature, whole matrices, Kronecker
# factors. Wrappers (such as masks and accumulation) and meshes are tested with these rows, and with all
# others only in the slow tests.
FAMILIES = tuple(
    TABLE[_NAMES.index(name)]
    for name in ("adamw", "schedule_free_sgd", "sophia_g", "muon", "shampoo", "soap")
)
