"""Optax's own common tests, run on our optimizers.

They ship in Optax's wheel, but as private modules: if a release moves them, this file fails.

What does not apply:

- complex parameters, which our optimizers refuse by name (`test_every_optimizer.py`);
- dtypes other than bfloat16 and float32 (float64 is in `test_parity.py`);
- `AliasTest.test_explicit_dtype`, which expects a moment in the parameters' dtype when no dtype is
  given, while ours are at least float32;
- `test_optimization` and the tests of extra arguments, accumulation, injection and schedules in
  `AliasTest` and `ScheduleAsLearningRateTest`: `ContribTest` has stricter versions of them;
- `ContribTest.test_preserve_dtype`, which expects the parameters' dtype: with a single dtype this is
  the same as `AliasTest`'s, which expects the gradients' dtype;
- `init` from shapes alone for schedule-free optimizers, whose state holds the parameters' values
  (`jax.eval_shape(tx.init, shapes)` works);
- types on a mesh for the further settings of matrix optimizers (`VARIANTS`), which our own tests
  cover; for matrices, types with and without `jit` are compared for one optimizer of each kind;
- Optax's wrappers (mechanize, schedule_free) and microbatching, which are not part of ravine.
"""

import os
import sys
import types
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
import ravine
from absl.testing import parameterized

from .optimizers_table import FAMILIES, TABLE, VARIANTS, builder

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    # sharding_test creates noisy_sgd in a way that Optax itself deprecates.
    warnings.filterwarnings("ignore", "Specifying a key will be required", UserWarning)
    # sharding_test sets XLA_FLAGS on import; leaving the context restores it.
    patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    if "sklearn" not in sys.modules:
        # alias_test imports scikit-learn for the L-BFGS tests, which are not run here.
        stand_in = types.ModuleType("sklearn")
        stand_in.datasets = stand_in.linear_model = None
        patch.setitem(sys.modules, "sklearn", stand_in)
    from optax._src import alias_test, sharding_test
    from optax.contrib import _common_test as contrib_test

# The tables of Optax's tests name an optimizer; its modules look the name up here.
alias_test._get_opt = lambda self, name: builder(name)
contrib_test._get_opt_factory = builder
# Optax's function reads the internals of the state of its own schedule_free.
contrib_test.contrib = types.SimpleNamespace(
    **{**vars(optax.contrib), "schedule_free_eval_params": ravine.schedule_free_eval_params}
)


def options(row, defaults=(), **arguments):
    """A row in the format of Optax's tests."""
    kwargs = {"learning_rate": row.constant_learning_rate, **dict(defaults), **row.hyperparameters}
    return {"opt_name": row.name, "opt_kwargs": kwargs, **arguments}


def present(row):
    """Values that keep every link in the chain.

    A momentum or decay of zero leaves its link out. As an injected array it is not known to be zero,
    and the states would differ in structure.
    """
    values = {"momentum": 0.9, "inner_momentum": 0.9, "weight_decay": 0.01}
    return {name: value for name, value in values.items() if row.accepts(name)}


NO_WRAPPER = {"wrapper_name": None, "wrapper_kwargs": None}
DTYPES = ("bfloat16", "float32")
# One operation at a time on a mesh takes up to a minute, so of the matrix optimizers only Muon runs, and
# one of each kind in the slow tests.
LONG = [row for row in FAMILIES if row.name in ("shampoo", "soap")]
EAGER = [row for row in TABLE if not row.needs_matrices or row.name == "muon"]
OTHERS = [row for row in TABLE if row not in FAMILIES]


def original(case, name, suffix="0"):
    """One of Optax's tests before it was parameterized."""
    return getattr(case, name + suffix).__wrapped__


def alias(name):
    return original(alias_test.AliasTest, name)


def contrib(name):
    return original(contrib_test.ContribTest, name)


def sharding(name):
    return original(sharding_test.ShardingTest, name, "_adam")


class NoSkips(parameterized.TestCase):
    def skipTest(self, reason):
        self.fail(f"Optax's test skips itself: {reason}")


def suite(rows):
    """Optax's tests for these optimizers."""
    any_shape = [row for row in rows if not row.needs_matrices]
    injected = [options(row, present(row), **NO_WRAPPER) for row in any_shape]
    contributed = [options(row, **NO_WRAPPER) for row in any_shape]
    matrices = [options(row, **NO_WRAPPER) for row in rows if row.needs_matrices]
    aliases = [options(row) for row in any_shape]

    class OptaxSuite(NoSkips):
        test_preserve_dtype = parameterized.product(aliases, dtype=DTYPES)(
            alias("test_preserve_dtype")
        )
        test_state_stability = parameterized.product(aliases, dtype=[jnp.bfloat16, jnp.float32])(
            alias("test_state_shape_dtype_shard_stability")
        )
        test_vectors = parameterized.product(
            contributed,
            target=[
                contrib_test._setup_parabola,
                contrib_test._setup_rosenbrock,
                contrib_test._setup_mixed_tensor_target,
            ],
            dtype=["float32"],
        )(contrib("test_optimizers"))
        test_matrices = parameterized.product(
            matrices, target=[contrib_test._setup_matrix_parabola], dtype=["float32"]
        )(contrib("test_optimizers"))
        test_extra_args = parameterized.product(contributed, wrap=[False])(
            contrib("test_optimizers_accept_extra_args")
        )
        test_inject_hyperparams = parameterized.product(injected)(
            contrib("test_optimizers_can_be_wrapped_in_inject_hyperparams")
        )
        test_schedule = parameterized.product(contributed)(
            contrib("test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such")
        )

    return OptaxSuite


def accumulation(rows):
    """Optax's test of its own accumulation with these optimizers."""
    contributed = [options(row, **NO_WRAPPER) for row in rows if not row.needs_matrices]

    class Accumulation(NoSkips):
        def setUp(self):
            super().setUp()
            # optax.MultiSteps itself divides floats by an int32 counter.
            self.enterContext(jax.numpy_dtype_promotion("standard"))

        test_gradient_accumulation = parameterized.product(contributed, dtype=DTYPES)(
            contrib("test_gradient_accumulation")
        )

    return Accumulation


def types_under_jit(rows):
    """Optax's test that types on a mesh are the same with and without `jit`."""
    return parameterized.named_parameters(rows)(
        sharding("test_state_sharding_type_preserved_with_jit")
    )


class OnMesh(NoSkips):
    def setUp(self):
        super().setUp()
        # The tests skip themselves for jax older than 0.7.2, as a string: "0.10" counts as older.
        self.enterContext(mock.patch.object(jax, "__version__", "1"))


def shardings(rows):
    """Optax's tests for these optimizers on a mesh."""
    built = {row: (str(TABLE.index(row)), row.build()) for row in rows}
    compiled = {
        row: (name, tx._replace(update=jax.jit(tx.update))) for row, (name, tx) in built.items()
    }

    class Sharding(OnMesh):
        test_abstract_init = parameterized.named_parameters(
            [built[row] for row in rows if not row.averages]
        )(sharding("test_init_with_abstract_input"))
        # Updates are compiled here, because Shampoo and related optimizers are slow one operation at a
        # time. The next test shows that types are the same with and without `jit`.
        test_type_of_update = parameterized.named_parameters(
            [compiled[row] for row in rows if row not in VARIANTS]
        )(sharding("test_state_sharding_type_init_match_update"))
        test_type_under_jit = types_under_jit([built[row] for row in rows if row in EAGER])

    return Sharding


# `test_every_optimizer.py` checks the same for every row, so one optimizer per family is enough here.
OptaxSuite, Accumulation, Sharding = (make(FAMILIES) for make in (suite, accumulation, shardings))


@pytest.mark.slow
class OptaxSuiteOfOthers(suite(OTHERS)):
    """The same tests for all other optimizers."""


@pytest.mark.slow
class AccumulationOfOthers(accumulation(OTHERS)):
    """The same tests for all other optimizers."""


@pytest.mark.slow
class ShardingOfOthers(shardings(OTHERS)):
    """The same tests for all other optimizers."""


@pytest.mark.slow
class ShardingOfMatrices(OnMesh):
    """Types with and without `jit` for optimizers that are slow one operation at a time."""

    test_type_under_jit = types_under_jit([(row.name, row.build()) for row in LONG])
