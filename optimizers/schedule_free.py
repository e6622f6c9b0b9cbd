"""Schedule-Free: an average of the iterates in place of a decaying learning rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, cast_like, increment, scalar, wide, wide_dtype, widest
from ..core.checks import check_decay_rates, check_non_negative
from ..core.transformation import states_of, with_extra_args
from ..core.tree_checks import check_params_given, check_real_leaves
from .adam import scale_by_adam
from .links.decay import DecayForm, Mask, with_decay
from .links.learning_rate import RATE_STATES, evaluate


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`."""

    count: jax.Array  # int32 scalar, updates made so far
    peak: jax.Array  # float32 scalar (float64 with x64): the largest learning rate so far
    weight_sum: jax.Array  # the same: sum of the weights of the average
    x: optax.Params  # like params, state_dtype: the average, where to evaluate
    z: optax.Params  # like params, state_dtype: the base optimizer's iterate
    base: Any  # the base optimizer's


@checked
def schedule_free(
    base: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    *,
    weight_power: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, averaged: gradients are evaluated between its iterate z and the average x.

    .. math::
        z_{t} &= z_{t-1} + \operatorname{base}(g_t, y_{t-1}), \qquad
        w_t = t^r \max_{s \le t} \eta_s^p, \qquad c_t = w_t / \textstyle\sum_{s \le t} w_s \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t, \qquad y_t = \beta_1 x_t + (1 - \beta_1) z_t

    The training parameters are y; evaluate and save :func:`schedule_free_eval_params`. The base
    optimizer decays y; it should have no momentum of its own and a learning rate that warms up and then
    stays constant.

    The state keeps both x and z, at least in float32. Optax computes x from y, so that the rounding of
    bfloat16 parameters enters the average, and its ``weight_sum`` in bfloat16 stops growing.

    Args:
      base: a complete optimizer with the same learning rate, such as ``adamw(learning_rate, b1=0)``.
      learning_rate: the same as that of `base`, a number or a schedule; it weights the average.
      b1: :math:`\beta_1` in [0, 1), how far y lies from z towards x.
      weight_power: r; above 0, later iterates get more weight.
      weight_lr_power: p; with 0, weights do not depend on the learning rate.
      state_dtype: dtype of x and z; by default at least float32.

    Raises:
      ValueError: for values out of range, or at the update when the parameters are missing.

    Source: Defazio et al., 2024, https://arxiv.org/abs/2405.15682; facebookresearch/schedule_free,
    ``adamw_schedulefree_reference.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.schedule_free(ravine.sgd(1.0), 1.0, b1=0.5)
      >>> params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
      >>> for grads in ([1.0], [3.0]):
      ...     updates, state = tx.update(jnp.array(grads), state, params)
      ...     params += updates
      >>> params, ravine.schedule_free_eval_params(state, params)
      (Array([-3.25], dtype=float32), Array([-2.5], dtype=float32))
    """
    check_decay_rates(b1=b1)
    check_non_negative(
        learning_rate=learning_rate, weight_power=weight_power, weight_lr_power=weight_lr_power
    )
    inner = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> ScheduleFreeState:
        check_real_leaves(params)
        # Two copies, so that each may be donated.
        copy = lambda p: jnp.array(p, dtype=state_dtype or wide_dtype(p.dtype), copy=True)
        return ScheduleFreeState(
            count=jnp.zeros([], jnp.int32),
            peak=jnp.zeros([], widest()),
            weight_sum=jnp.zeros([], widest()),
            x=jax.tree.map(copy, params),
            z=jax.tree.map(copy, params),
            base=inner.init(params),
        )

    def update(
        updates: optax.Updates,
        state: ScheduleFreeState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScheduleFreeState]:
        check_params_given(params, "schedule_free")
        count = increment(state.count)
        dtype = state.peak.dtype
        wide_updates = jax.tree.map(wide, updates)
        steps, base_state = inner.update(wide_updates, state.base, params, **extra)
        used = [rate[1] for rate in states_of(RATE_STATES, base_state)]
        rate = used[0] if len(used) == 1 else evaluate(learning_rate, state.count)
        peak = jnp.maximum(state.peak, jnp.asarray(rate).astype(dtype))
        weight = peak ** jnp.asarray(weight_lr_power, dtype)
        weight *= count.astype(dtype) ** jnp.asarray(weight_power, dtype)
        weight_sum = state.weight_sum + weight
        share = weight / jnp.where(weight_sum > 0, weight_sum, 1)

        z = jax.tree.map(lambda z, step: wide(z) + cast(step, wide(z).dtype), state.z, steps)
        # As differences, so that nothing moves where x and z are equal.
        x = jax.tree.map(lambda x, z: wide(x) + cast(share, z.dtype) * (z - wide(x)), state.x, z)

        def change(g: jax.Array, x: jax.Array, z: jax.Array, p: jax.Array) -> jax.Array:
            y = z + scalar(b1, z.dtype) * (x - z)
            return cast(y - cast(p, y.dtype), g.dtype)

        changes = jax.tree.map(change, updates, x, z, params)
        state = ScheduleFreeState(
            count, peak, weight_sum, cast_like(x, state.x), cast_like(z, state.z), base_state
        )
        return changes, state

    return with_extra_args(init, update)


def schedule_free_eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The average x, in the parameters' dtypes; parameters without one are returned unchanged.

    Args:
      opt_state: the optimizer's whole state; `schedule_free` may be anywhere in it: chained, masked,
        partitioned, accumulated.
      params: the training parameters; with ``optimizer.opt_state`` of a ``flax.nnx.Optimizer``,
        ``nnx.state(model, nnx.Param)`` of its model; pass the result to ``nnx.update(model, ...)``.

    Raises:
      ValueError: if there is no `schedule_free` in the state, or it is for other parameters.

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> tx = optax.chain(optax.clip(1.0), ravine.schedule_free_sgd(1.0))
      >>> params = {"w": jnp.zeros(2)}
      >>> ravine.schedule_free_eval_params(tx.init(params), params)
      {'w': Array([0., 0.], dtype=float32)}
    """
    found = states_of(ScheduleFreeState, opt_state)
    if not found:
        raise ValueError("this state holds no schedule_free; evaluate the parameters themselves.")
    # Matched by path, since Flax NNX variables have one type in the state and another in the model, and
    # masked parameters are not in the state.
    averages: dict[Any, Any] = {}
    for state in found:
        averages |= dict(jax.tree_util.tree_leaves_with_path(state.x))
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    if unknown := averages.keys() - dict(leaves).keys():
        path = jax.tree_util.keystr(next(iter(unknown)))
        raise ValueError(
            f"the state has an average of {path}, which is not in params; give the parameters that the "
            "optimizer was made for, nnx.state(model, nnx.Param) of a Flax NNX model."
        )
    best = [cast(averages.get(path, p), p.dtype) for path, p in leaves]
    return jax.tree.unflatten(structure, best)


@checked
def schedule_free_sgd(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    b1: float = 0.9,
    *,
    weight_power: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""Schedule-Free SGD: no decay of the rate, an average of the iterates instead.

    For runs of unknown length, where SGD would do. Evaluate and save :func:`schedule_free_eval_params`.
    The recurrence is that of :func:`schedule_free`.

    State: 8 bytes per parameter. Starting rates: 10 to 50 times those of SGD with a schedule, the
    authors say, after a warm-up.

    Args:
      learning_rate: a number or a schedule that warms up and then stays.
      b1, weight_power, weight_lr_power, state_dtype: as for :func:`schedule_free`.
      weight_decay, weight_decay_mask, weight_decay_form: of y, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`schedule_free`, ``sgd_schedulefree_reference.py``.

    Example:
      >>> import ravine
      >>> tx = ravine.schedule_free_sgd(1.0, weight_decay=1e-4)
    """
    base = with_decay(
        optax.identity(), learning_rate, weight_decay, weight_decay_mask, form=weight_decay_form
    )
    return schedule_free(
        base,
        learning_rate,
        b1,
        weight_power=weight_power,
        weight_lr_power=weight_lr_power,
        state_dtype=state_dtype,
    )


@checked
def schedule_free_adamw(
    learning_rate: optax.ScalarOrSchedule = 2.5e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    inner_momentum: float = 0.0,
    weight_power: float = 0.0,
    weight_lr_power: float = 2.0,
    nu_dtype: Any = None,
    state_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""Schedule-Free AdamW: no decay of the rate, an average of the iterates instead.

    For runs of unknown length. Gradients are evaluated at the training parameters; evaluate and save
    :func:`schedule_free_eval_params`. The recurrence is that of :func:`schedule_free`.

    State: 12 bytes per parameter. Starting rates: 2.5e-3, the authors', after a warm-up.

    Args:
      learning_rate: a number or a schedule that warms up and then stays.
      b1, weight_power, weight_lr_power, state_dtype: as for :func:`schedule_free`.
      b2: :math:`\beta_2` in [0, 1).
      eps: added outside the root.
      inner_momentum: b1 of Adam itself; the authors' default is none.
      nu_dtype: dtype of the second moment; by default at least float32.
      weight_decay, weight_decay_mask, weight_decay_form: of y, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`schedule_free`.

    Example:
      >>> import ravine
      >>> warmup = ravine.schedules.warmup(ravine.schedules.constant(2.5e-3), 1000)
      >>> tx = ravine.schedule_free_adamw(warmup, weight_decay=0.1)
    """
    check_decay_rates(inner_momentum=inner_momentum)
    base = with_decay(
        scale_by_adam(inner_momentum, b2, eps, nu_dtype=nu_dtype),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
    return schedule_free(
        base,
        learning_rate,
        b1,
        weight_power=weight_power,
        weight_lr_power=weight_lr_power,
        state_dtype=state_dtype,
    )
