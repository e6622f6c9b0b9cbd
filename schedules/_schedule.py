"""What every builder returns: a pure function of the count that can describe itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import LARGEST_COUNT

MOST_VALUES = 10**8  # of lists with a value for every step


@checked
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A pure function `count -> value`, with words and boundaries for people.

    It can be used wherever Optax takes a schedule, and Optax's schedules wherever this library takes
    one.

    Attributes:
      function: an array of whole counts, none negative, to float32 values of the same shape.
      words: a description in plain words.
      boundaries: the counts at which a phase begins or ends, rising.

    Raises:
      ValueError: when called with counts that are not whole numbers.

    Example:
      >>> import ravine
      >>> schedule = ravine.schedules.linear(1.0, 4)
      >>> schedule(jnp.arange(6))
      Array([1.  , 0.75, 0.5 , 0.25, 0.  , 0.  ], dtype=float32)
      >>> schedule.boundaries
      (0, 4)
    """

    function: Callable[[jax.Array], jax.Array]
    words: str
    boundaries: tuple[int, ...] = (0,)

    def __call__(self, count: Any) -> jax.Array:
        """The value after `count` updates: a Python integer, a scalar or an array of counts."""
        return self.function(as_count(count))


def as_count(count: Any) -> jax.Array:
    """Counts as an integer array, none negative."""
    if isinstance(count, int):
        _check_count(count)
    given, count = count, jnp.asarray(count)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"a schedule counts updates in whole numbers, got {count.dtype}; "
            "give an integer or an integer array."
        )
    if count.dtype != jnp.int64:
        if isinstance(given, np.ndarray | np.generic) and given.size:  # JAX would wrap them around
            _check_count(int(given.max()))
            _check_count(int(given.min()))
        if count.dtype in (jnp.uint32, jnp.uint64):
            count = jnp.minimum(count, count.dtype.type(LARGEST_COUNT))
        count = count.astype(jnp.int32)
    return jnp.maximum(count, 0)


def _check_count(count: int) -> None:
    if abs(count) > LARGEST_COUNT:
        raise ValueError(
            f"count must be at most {LARGEST_COUNT}, as updates are counted in int32, got {count}."
        )


def evaluate(schedule: optax.Schedule, count: jax.Array) -> jax.Array:
    """The values of any schedule, as float32 in the shape of the counts."""
    return jnp.broadcast_to(jnp.asarray(schedule(count), jnp.float32), count.shape)


def words_of(schedule: optax.Schedule) -> str:
    """A schedule's own description, or the name of a function that has none."""
    if isinstance(schedule, Schedule):
        return schedule.words
    return getattr(schedule, "__name__", type(schedule).__name__)


def boundaries_of(schedule: optax.Schedule) -> tuple[int, ...]:
    """The boundaries of a schedule, where it has them."""
    return schedule.boundaries if isinstance(schedule, Schedule) else (0,)


def value_at(schedule: optax.Schedule, count: int) -> float:
    """The value at a Python integer, a Python number even while JAX is tracing."""
    with jax.ensure_compile_time_eval():
        return float(np.asarray(schedule(count)))


def values_of(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The values at all counts of a run, float64."""
    if steps > MOST_VALUES:
        raise ValueError(f"steps must be at most {MOST_VALUES}, got {steps}.")
    return np.asarray(evaluate(schedule, jnp.arange(steps)), np.float64)
