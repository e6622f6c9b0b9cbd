r"""Weight decay: one transformation with named forms, which differ in what they add and in their place
in the chain.

With :math:`u_t` the direction, :math:`\eta_t` the learning rate and :math:`\lambda_t` the decay:

===============  ===============================================================  ====================
form             parameters after the update                                      stands
===============  ===============================================================  ====================
``coupled``      :math:`\theta - \eta (u + \lambda \theta)`                       before the rate
``independent``  :math:`\theta - \eta u - \lambda \theta`                         after the rate
``adamc``        :math:`\theta - \eta (u + \lambda (\eta / \eta_{\max}) \theta)`  before the rate
``l2``           :math:`\theta - \eta u(g + \lambda \theta)`                      before the direction
``proximal``     :math:`(\theta - \eta u) / (1 + \eta \lambda)`                   after the rate
``cautious``     :math:`\theta - \eta (u + \lambda [u \theta \ge 0] \theta)`      before the rate
===============  ===============================================================  ====================

`with_decay` puts each form in its place. ``coupled`` is the decay of AdamW in PyTorch and Optax,
``independent`` that of its paper.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import cast, increment, scalar, wide_dtype
from ...core.checks import check_non_negative
from ...core.transformation import transformation
from ...core.tree_checks import as_mask, check_mask, check_params_given
from .learning_rate import evaluate, in_words, scale_by_learning_rate

Mask = Annotated[
    Any | Callable[[optax.Params], Any], as_mask, "a tree of booleans, or a function that makes one"
]
DecayForm = Literal["coupled", "independent", "adamc", "l2", "proximal", "cautious"]


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`."""

    count: jax.Array  # int32 scalar, updates so far, including skipped ones


@checked
def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    form: DecayForm = "coupled",
    learning_rate: optax.ScalarOrSchedule | None = None,
    peak_learning_rate: float | None = None,
) -> optax.GradientTransformation:
    r"""Weight decay in one of its forms; the module's table gives its place in a chain.

    The arithmetic is done in float32 and returned in the updates' dtype, so bfloat16 updates and
    float32 parameters mix.

    Args:
      weight_decay: :math:`\lambda`, a non-negative number or a schedule of the update count.
      mask: a tree of booleans shaped like the parameters (or a prefix), or a function from the
        parameters to one; ``True`` decays. ``None`` decays everything. Masks by role come from
        :func:`ravine.optimizers.roles.mask_by_role`.
      form: ``"coupled"``, ``"independent"``, ``"adamc"``, ``"l2"``, ``"proximal"`` or ``"cautious"``.
      learning_rate: :math:`\eta`, for the forms ``"adamc"`` and ``"proximal"`` only.
      peak_learning_rate: :math:`\eta_{\max}`, for ``"adamc"`` under a schedule.

    Raises:
      ValueError: if `weight_decay` is negative or non-finite, if a learning rate is missing or not
        needed, at `init` for a mask that selects nothing or leaves parameters out, or at the update
        when the parameters are missing.

    Source: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101 (coupled, independent);
    Defazio, 2025, https://arxiv.org/abs/2506.02285 (AdamC, meant for layers that a norm follows);
    Xie et al., 2022, https://arxiv.org/abs/2208.06677 (proximal); Chen et al., 2025,
    https://arxiv.org/abs/2510.12402 (cautious).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.add_decayed_weights(0.1)
      >>> params = jnp.array([2.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
      Array([1.2], dtype=float32)
    """
    check_non_negative(weight_decay=weight_decay)
    _check_form(form, learning_rate, peak_learning_rate)

    def init(params: optax.Params) -> AddDecayedWeightsState:
        del params
        return AddDecayedWeightsState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: AddDecayedWeightsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AddDecayedWeightsState]:
        check_params_given(params, "weight decay")
        decay = evaluate(weight_decay, state.count)
        if form == "adamc":
            rate = evaluate(learning_rate, state.count)
            peak = rate if peak_learning_rate is None else peak_learning_rate
            decay = 0.0 if _is_zero(peak) else decay * (rate / peak)
        elif form == "proximal":
            decay = decay * evaluate(learning_rate, state.count)

        def decayed(u: jax.Array, p: jax.Array) -> jax.Array:
            dtype = wide_dtype(u.dtype, p.dtype)
            wide_u, wide_p, factor = cast(u, dtype), cast(p, dtype), scalar(decay, dtype)
            if form == "cautious":
                wide_p = jnp.where(jnp.sign(wide_u) * jnp.sign(wide_p) < 0, 0, wide_p)
            if form == "independent":
                factor = -factor
            if form == "proximal":
                return cast((wide_u - factor * wide_p) / (1 + factor), u.dtype)
            return cast(wide_u + factor * wide_p, u.dtype)

        state = AddDecayedWeightsState(increment(state.count))
        return jax.tree.map(decayed, updates, params), state

    def describe(params: optax.Params) -> dict[str, str]:
        del params
        return {"decay": in_words(weight_decay) + ("" if form == "coupled" else f" {form}")}

    tx = transformation(init, update, describe)
    if mask is None:
        return tx
    masked = optax.masked(tx, mask)

    def checked_init(params: optax.Params) -> Any:
        check_mask(mask, params, "weight_decay_mask")
        return masked.init(params)

    return optax.GradientTransformation(checked_init, masked.update)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _check_form(form: str, learning_rate: Any, peak_learning_rate: Any) -> None:
    needs_rate = form in ("adamc", "proximal")
    if needs_rate != (learning_rate is not None):
        raise ValueError(
            f"weight decay of form {form!r} {'needs' if needs_rate else 'does not take'} a "
            f"learning_rate; {'give the one of the chain' if needs_rate else 'drop it'}."
        )
    needs_peak = form == "adamc" and callable(learning_rate)
    if needs_peak and not peak_learning_rate:
        raise ValueError(
            "weight decay of form 'adamc' cannot see the peak of a schedule; "
            "give with_decay(direction, learning_rate, ...) peak_learning_rate > 0."
        )
    if not needs_peak and peak_learning_rate is not None:
        raise ValueError("peak_learning_rate is for form 'adamc' under a schedule only; drop it.")
    check_non_negative(peak_learning_rate=peak_learning_rate)


@checked
def with_decay(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    form: DecayForm = "coupled",
    peak_learning_rate: float | None = None,
) -> optax.GradientTransformation:
    r"""A direction with weight decay of any form and a learning rate: a complete optimizer.

    Args:
      direction: neither negated nor scaled, such as :func:`scale_by_adam`.
      learning_rate: a number or a schedule.
      weight_decay: a number or a schedule; the constant 0 leaves the decay out.
      mask: which parameters decay, see :func:`add_decayed_weights`.
      form: see :func:`add_decayed_weights`.
      peak_learning_rate: for ``"adamc"`` under a schedule.

    Raises:
      ValueError: as :func:`add_decayed_weights`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.with_decay(ravine.scale_by_lion(), 0.1, 1e-3, form="independent")
      >>> params = jnp.array([100.0])
      >>> tx.update(jnp.array([1.0]), tx.init(params), params)[0]
      Array([-0.2], dtype=float32)
    """
    needs_rate = form in ("adamc", "proximal")
    _check_form(form, learning_rate if needs_rate else None, peak_learning_rate)
    rate = scale_by_learning_rate(learning_rate)
    if _is_zero(weight_decay):
        return optax.chain(direction, optax.identity(), rate)
    decay = add_decayed_weights(
        weight_decay,
        mask,
        form=form,
        learning_rate=learning_rate if needs_rate else None,
        peak_learning_rate=peak_learning_rate,
    )
    if form == "l2":
        return optax.chain(decay, direction, rate)
    if form in ("independent", "proximal"):
        return optax.chain(direction, rate, decay)
    return optax.chain(direction, decay, rate)


def decay_or_identity(
    weight_decay: optax.ScalarOrSchedule, mask: Mask | None
) -> optax.GradientTransformation:
    """`add_decayed_weights`, or nothing at all when the decay is the constant zero."""
    return optax.identity() if _is_zero(weight_decay) else add_decayed_weights(weight_decay, mask)


class AfterFirstState(NamedTuple):
    """State of `decay_after_first`."""

    started: jax.Array  # int32 scalar: 1 after an update that no guard skipped, before it 0
    inner: Any  # of the decay, with its clock


def decay_after_first(
    weight_decay: optax.ScalarOrSchedule, mask: Mask | None
) -> optax.GradientTransformation:
    """`decay_or_identity`, except on the first update, on which no parameter moves."""
    if _is_zero(weight_decay):
        return optax.identity()
    decay = add_decayed_weights(weight_decay, mask)

    def init(params: optax.Params) -> AfterFirstState:
        return AfterFirstState(jnp.zeros([], jnp.int32), decay.init(params))

    def update(
        updates: optax.Updates, state: AfterFirstState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AfterFirstState]:
        decayed, inner = decay.update(updates, state.inner, params)
        updates = jax.tree.map(lambda d, u: jnp.where(state.started > 0, d, u), decayed, updates)
        return updates, AfterFirstState(jnp.ones_like(state.started), inner)

    return transformation(init, update)


@checked
def add_cautious_decay(
    weight_decay: optax.ScalarOrSchedule = 0.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    r"""Decays only where the update and the decay agree: form ``"cautious"``.

    .. math:: u + \lambda_t \, [u \theta \ge 0] \, \theta

    Args:
      weight_decay: :math:`\lambda`, a non-negative number or a schedule of the update count.
      mask: which parameters decay, see :func:`add_decayed_weights`.

    Raises:
      ValueError: as :func:`add_decayed_weights`.

    Source: Chen et al., 2025, https://arxiv.org/abs/2510.12402.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.add_cautious_decay(0.5), jnp.array([2.0, 2.0])
      >>> tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)[0]
      Array([ 2., -1.], dtype=float32)
    """
    return add_decayed_weights(weight_decay, mask, form="cautious")
