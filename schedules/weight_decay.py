r"""How weight decay changes over a run.

Each is the coefficient :math:`\lambda_t` of
:math:`\theta \leftarrow \theta - \eta_t (u_t + \lambda_t \theta)`, as ``ravine.adamw`` and the other
chains take it in ``weight_decay``. A cautious decay, which spares the weights that the update
makes larger, is another transformation (:func:`ravine.add_cautious_decay`) and takes the same
coefficients.
"""

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.checks import check_finite, check_positive
from ._arithmetic import times
from ._schedule import Schedule, boundaries_of, evaluate, words_of
from .shapes import constant, decay


def _check(weight_decay: float) -> None:
    check_finite(weight_decay=weight_decay)
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay!r}.")


@checked
def coupled_decay(weight_decay: float) -> Schedule:
    r"""A constant coefficient: an update removes the share :math:`\eta_t \lambda`.

    What PyTorch and Optax call decoupled; its effect falls with the learning rate.

    Args:
      weight_decay: :math:`\lambda`; 0.1 is the custom of language models.

    Raises:
      ValueError: if it is negative or not finite.

    Example:
      >>> import ravine
      >>> float(ravine.schedules.coupled_decay(0.1)(5))
      0.10000000149011612
    """
    _check(weight_decay)
    return constant(weight_decay)


@checked
def independent_decay(
    weight_decay: float,
    learning_rate: optax.Schedule,
    shape: optax.Schedule | None = None,
) -> Schedule:
    r"""A coefficient that cancels the learning rate: an update removes the share :math:`s_t \lambda'`.

    .. math:: \lambda_t = s_t \lambda' / \eta_t

    Where the learning rate is zero, nothing decays.

    Args:
      weight_decay: :math:`\lambda'`, the share of a weight that an update removes; a coupled decay
        becomes one by the factor of the peak learning rate.
      learning_rate: :math:`\eta_t`, the schedule of the same chain.
      shape: :math:`s_t`; by default 1 throughout, and :math:`\eta_t / \max \eta` would be the
        coupled decay again.

    Raises:
      ValueError: if the coefficient is negative or not finite.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101, algorithm 2; Wortsman et
    al., 2023, https://arxiv.org/abs/2309.14322, with 1e-4.

    Example:
      >>> import ravine
      >>> from ravine.schedules import independent_decay, linear
      >>> rate = linear(0.5, 4)
      >>> decay = independent_decay(1e-3, rate)
      >>> [round(float(rate(count) * decay(count)), 6) for count in (0, 3, 4)]
      [0.001, 0.001, 0.0]
    """
    _check(weight_decay)

    def function(count: jax.Array) -> jax.Array:
        rate = evaluate(learning_rate, count)
        kept = jnp.full(count.shape, weight_decay, jnp.float32)
        if shape is not None:
            kept = times(evaluate(shape, count), weight_decay)
        return jnp.where(rate == 0, 0.0, kept / jnp.where(rate == 0, 1.0, rate))

    return Schedule(function, "independent weight decay", boundaries_of(learning_rate))


@checked
def adamc_decay(weight_decay: float, learning_rate: optax.Schedule, peak: float) -> Schedule:
    r"""A coefficient that falls with the learning rate (AdamC).

    .. math:: \lambda_t = \lambda \, \eta_t / \eta_{\max}

    For weights followed by a normalization: it keeps their ratio of gradient to weight,
    :math:`\sqrt{2 \lambda_t / \eta_t}` when at rest, from rising as the learning rate falls. Not for
    the output head.

    Args:
      weight_decay: :math:`\lambda`, the coefficient at the peak.
      learning_rate: :math:`\eta_t`.
      peak: :math:`\eta_{\max}`, positive.

    Raises:
      ValueError: for values out of range.

    Source: Defazio, 2025, https://arxiv.org/abs/2506.02285.

    Example:
      >>> import ravine
      >>> from ravine.schedules import adamc_decay, linear
      >>> [float(adamc_decay(0.5, linear(1e-3, 4), 1e-3)(count)) for count in (0, 2, 4)]
      [0.5, 0.25, 0.0]
    """
    _check(weight_decay)
    check_positive(peak=peak)

    def function(count: jax.Array) -> jax.Array:
        return times(evaluate(learning_rate, count), weight_decay / peak)

    words = f"weight decay along {words_of(learning_rate)}"
    return Schedule(function, words, boundaries_of(learning_rate))


@checked
def decay_to_none(weight_decay: float, steps: int, shape: str = "cosine") -> Schedule:
    """A coefficient that falls to zero over the run.

    Args:
      weight_decay: the coefficient at count 0.
      steps: the length of the run.
      shape: see :func:`decay`; nanochat has ``"cosine"`` and a cautious decay.

    Raises:
      ValueError: for values out of range or an unknown shape.

    Source: karpathy/nanochat.

    Example:
      >>> import ravine
      >>> coefficient = ravine.schedules.decay_to_none(0.5, 100)
      >>> tx = ravine.add_cautious_decay(coefficient)
      >>> [round(float(coefficient(count)), 3) for count in (0, 50, 100)]
      [0.5, 0.25, 0.0]
    """
    _check(weight_decay)
    return decay(weight_decay, steps, shape)
