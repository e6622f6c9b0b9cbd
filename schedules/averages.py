"""Averages of parameters, which can replace a decay, and how both weigh the updates of a run."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..core.arguments import checked
from ..core.checks import check_finite, check_whole
from ._checks import check_length
from ._schedule import evaluate, values_of


class ParameterAverage(NamedTuple):
    """An average of parameters as three pure functions.

    Attributes:
      init: parameters -> state.
      update: parameters, state -> state, after every update of the parameters.
      average: state -> the averaged parameters, float32.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    average: Callable[[Any], Any]


class AverageState(NamedTuple):
    """State of `ema` and `lawa`."""

    count: jax.Array  # int32 scalar, parameters seen after the first
    kept: Any  # like the parameters, float32; with a leading axis [window] for `lawa`


def _rates(decay: optax.ScalarOrSchedule, steps: int) -> np.ndarray:
    if callable(decay):
        return values_of(decay, steps)
    return values_of(lambda _: decay, steps)


@checked
def ema(decay: optax.ScalarOrSchedule = 0.999) -> ParameterAverage:
    r"""An exponential moving average that starts at the initial parameters.

    .. math:: \bar\theta \leftarrow \beta_t \bar\theta + (1 - \beta_t) \theta

    Args:
      decay: :math:`\beta`, in [0, 1), or a schedule; :func:`ema_horizon` forgets the start.

    Raises:
      ValueError: for a number out of range.

    Source: Polyak and Juditsky, 1992; Morales-Brotons et al., 2024,
    https://arxiv.org/abs/2411.18704.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.schedules.ema(0.5)
      >>> state = tx.update(jnp.array([3.0]), tx.init(jnp.array([1.0])))
      >>> tx.average(state)
      Array([2.], dtype=float32)
    """
    if not callable(decay):
        check_finite(decay=decay)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}; 0.999 is common.")

    def init(params: Any) -> AverageState:
        kept = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
        return AverageState(jnp.zeros([], jnp.int32), kept)

    def update(params: Any, state: AverageState) -> AverageState:
        rate = evaluate(decay, state.count) if callable(decay) else jnp.float32(decay)
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        kept = optax.incremental_update(params, state.kept, 1.0 - rate)
        return AverageState(state.count + 1, kept)

    return ParameterAverage(init, update, lambda state: state.kept)


@checked
def lawa(window: int, every: int = 1) -> ParameterAverage:
    """The plain mean of the latest checkpoints.

    Args:
      window: number of checkpoints kept, at least 1.
      every: updates between two of them, at least 1; the initial parameters are not one.

    Raises:
      ValueError: for values out of range.

    Source: Kaddour, 2022, https://arxiv.org/abs/2209.14981; Sanyal et al., 2023,
    https://arxiv.org/abs/2306.03241.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.schedules.lawa(window=2)
      >>> state = tx.init(jnp.array([0.0]))
      >>> for value in (1.0, 2.0, 4.0):
      ...     state = tx.update(jnp.array([value]), state)
      >>> tx.average(state)
      Array([3.], dtype=float32)
    """
    check_whole(1, window=window, every=every)

    def init(params: Any) -> AverageState:
        kept = jax.tree.map(
            lambda p: jnp.zeros((window, *p.shape), jnp.float32).at[0].set(p.astype(jnp.float32)),
            params,
        )
        return AverageState(jnp.zeros([], jnp.int32), kept)

    def update(params: Any, state: AverageState) -> AverageState:
        count = state.count + 1
        slot = jnp.remainder(count // every - 1, window)

        def store(kept: jax.Array, p: jax.Array) -> jax.Array:
            new = jnp.where(count % every == 0, p.astype(jnp.float32), kept[slot])
            return kept.at[slot].set(new)

        return AverageState(count, jax.tree.map(store, state.kept, params))

    def average(state: AverageState) -> Any:
        filled = jnp.clip(state.count // every, 1, window).astype(jnp.float32)
        return jax.tree.map(lambda kept: jnp.sum(kept, axis=0) / filled, state.kept)

    return ParameterAverage(init, update, average)


@checked
def merge(checkpoints: Sequence[Any], weights: Sequence[float]) -> Any:
    r"""A weighted sum of checkpoints, :math:`\sum_j c_j \theta_j`, in float32.

    Args:
      checkpoints: trees of parameters.
      weights: :math:`c_j`, one for each; they add up to 1.

    Raises:
      ValueError: if there are not as many weights, or they do not add up to 1.

    Source: Tian et al. (WSM), 2025, https://arxiv.org/abs/2507.17634.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> ravine.schedules.merge([jnp.array([1.0]), jnp.array([3.0])], [0.5, 0.5])
      Array([2.], dtype=float32)
    """
    check_length("weights", weights, len(checkpoints), "one for each checkpoint")
    if not np.isclose(np.sum(weights), 1.0):
        raise ValueError(f"weights must add up to 1, got {np.sum(weights)}; divide by their sum.")
    scales = [np.float32(weight) for weight in weights]

    def merged(*leaves: Any) -> jax.Array:
        parts = zip(scales, leaves, strict=True)
        return functools.reduce(operator.add, (c * jnp.asarray(p, jnp.float32) for c, p in parts))

    return jax.tree.map(merged, *checkpoints)


def merge_weights(decay: Any) -> np.ndarray:
    r"""The weights of checkpoints whose merge is equivalent to a decay.

    Merging :math:`\theta_0 \dots \theta_n` with weights :math:`c_j` is as if the update that leads
    from :math:`\theta_{i-1}` to :math:`\theta_i` had been multiplied by
    :math:`w_i = \sum_{j \ge i} c_j`, so

    .. math:: c_0 = 1 - w_1, \qquad c_j = w_j - w_{j+1}, \qquad c_n = w_n

    Args:
      decay: :math:`w_1 \dots w_n`, falling, in [0, 1]: a schedule's values relative to its peak.

    Returns:
      :math:`c_0 \dots c_n`, float64, which add up to 1.

    Raises:
      ValueError: unless the decay is a list of numbers that falls within [0, 1].

    Source: Tian et al. (WSM), 2025, https://arxiv.org/abs/2507.17634.

    Example:
      >>> import ravine
      >>> ravine.schedules.merge_weights([0.75, 0.5, 0.25])
      array([0.25, 0.25, 0.25, 0.25])
    """
    w = np.asarray(decay, np.float64)
    if w.ndim != 1 or not w.size:
        raise ValueError(f"decay must be a list of numbers, got shape {w.shape}.")
    padded = np.concatenate([[1.0], w, [0.0]])
    if not (np.diff(padded) <= 1e-7).all():
        raise ValueError("decay must fall within [0, 1]; divide the schedule by its peak.")
    return -np.diff(padded)


def decay_of_merge(weights: Any) -> np.ndarray:
    r"""The decay that a merge is equivalent to: :math:`w_i = \sum_{j \ge i} c_j`.

    Args:
      weights: :math:`c_0 \dots c_n`.

    Returns:
      :math:`w_1 \dots w_n`, float64; the inverse of :func:`merge_weights`.

    Example:
      >>> import ravine
      >>> ravine.schedules.decay_of_merge([0.25, 0.25, 0.25, 0.25])
      array([0.75, 0.5 , 0.25])
    """
    c = np.asarray(weights, np.float64)
    return np.cumsum(c[::-1])[::-1][1:]


@checked
def ema_weights(decay: optax.ScalarOrSchedule, steps: int) -> np.ndarray:
    r"""How much :func:`ema` weighs each of :math:`\theta_0 \dots \theta_n`.

    Args:
      decay: a number or a schedule.
      steps: :math:`n`, at least 1.

    Returns:
      :math:`c_j = (1 - \beta_j) \prod_{k > j} \beta_k`, float64.

    Raises:
      ValueError: if there are no steps.

    Example:
      >>> import ravine
      >>> ravine.schedules.ema_weights(0.5, 2)
      array([0.25, 0.25, 0.5 ])
    """
    check_whole(1, steps=steps)
    rates = _rates(decay, steps)
    later = np.append(np.cumprod(rates[::-1])[::-1], 1.0)
    return later * np.append(1.0, 1.0 - rates)


class UpdateWeights(NamedTuple):
    """What remains at the end of a run, see `update_weights`."""

    initial: float  # of the initial parameters
    updates: np.ndarray  # [steps] of each past update, in units of -1 / weight decay


@checked
def update_weights(
    schedule: optax.Schedule, weight_decay: optax.ScalarOrSchedule, steps: int
) -> UpdateWeights:
    r"""How much of each past update survives in AdamW's final weights.

    With decay, AdamW is an exponential average of its updates:

    .. math::
        \theta_T = c_0 \theta_0 + \sum_i c_i \left(-\frac{u_i}{\lambda_i}\right), \qquad
        c_i = \eta_i \lambda_i \prod_{j > i} (1 - \eta_j \lambda_j), \qquad
        c_0 = \prod_j (1 - \eta_j \lambda_j)

    which add up to 1. The average reaches back :math:`1 / (\eta \lambda)` updates.

    Args:
      schedule: the learning rate.
      weight_decay: :math:`\lambda`, a number or a schedule.
      steps: :math:`T`, at least 1.

    Returns:
      :math:`c_0` and :math:`c_1 \dots c_T`, float64.

    Raises:
      ValueError: if there are no steps.

    Source: Wang and Aitchison, 2024, https://arxiv.org/abs/2405.13698; Bergsma et al., 2025,
    https://arxiv.org/abs/2502.15938.

    Example:
      >>> import ravine
      >>> from ravine.schedules import constant, update_weights
      >>> update_weights(constant(0.5), 1.0, 3)
      UpdateWeights(initial=0.125, updates=array([0.125, 0.25 , 0.5  ]))
    """
    check_whole(1, steps=steps)
    removed = _rates(schedule, steps) * _rates(weight_decay, steps)
    left = np.append(np.cumprod((1.0 - removed)[::-1])[::-1], 1.0)
    return UpdateWeights(float(left[0]), removed * left[1:])
