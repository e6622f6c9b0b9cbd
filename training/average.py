"""An exponential moving average of the parameters beside the run, kept in the optimizer's state."""

from typing import Any, NamedTuple

import optax

from ..core.transformation import states_of, with_extra_args
from ..schedules import ema
from ..schedules.averages import AverageState


class EmaState(NamedTuple):
    """State of `with_ema`."""

    average: AverageState  # of the parameters after every update
    inner: Any  # the optimizer's


def with_ema(
    tx: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    r"""`tx`, with :math:`\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta` in its state.

    Updates are those of `tx`. In the state, the average is checkpointed and sharded as the parameters
    are; inside a guard a skipped step leaves it alone.

    Args:
      tx: the whole optimizer.
      decay: :math:`\beta`, in [0, 1).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.training.average import averaged, with_ema
      >>> tx, params = with_ema(ravine.sgd(1.0), 0.5), {"bias": jnp.zeros(1)}
      >>> _, state = tx.update({"bias": jnp.full(1, -2.0)}, tx.init(params), params)
      >>> averaged(state)["bias"]
      Array([1.], dtype=float32)
    """
    average, tx = ema(decay), optax.with_extra_args_support(tx)

    def init(params: Any) -> EmaState:
        return EmaState(average.init(params), tx.init(params))

    def update(updates: Any, state: EmaState, params: Any = None, **extra: Any) -> Any:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        return updates, EmaState(average.update(after, state.average), inner)

    return with_extra_args(init, update)


def averaged(opt_state: Any) -> Any:
    """The averaged parameters in a state, float32."""
    (found,) = states_of(EmaState, opt_state)
    return found.average.kept
