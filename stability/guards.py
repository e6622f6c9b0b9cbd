"""Guards: a harmful step is skipped, and leaves no trace but the time it took.

Whether to skip is decided before the optimizer runs, which then does not run at all: a select, never a
product with zero, which would keep NaN. Schedules go on, so that they stay in step with the run. All
memory is in the state, so it is checkpointed and needs no round trip to the host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import is_summable
from ..core.checks import check_positive, check_whole
from ._arithmetic import global_norm
from ._checks import check_extra_given, check_scalar_loss
from ._window import Window, empty_window, push, threshold
from .guarded_step import Guarded, guarded


class FiniteGateState(NamedTuple):
    """State of `finite_gate`."""

    skipped: jax.Array  # int32 scalar, steps not made so far
    in_a_row: jax.Array  # int32 scalar, of them since the last step that was made
    inner: Any  # the inner optimizer's


@checked
def finite_gate(tx: optax.GradientTransformation) -> Guarded:
    """`tx`, but steps with infinities or NaN in the gradients or the loss are skipped.

    So are steps whose gradients' squares cannot be summed in float32 (a norm above 1.3e19): they would
    make second moments infinite, and an average never recovers from infinity.

    Then the parameters and the state of `tx` stay what they are, bit by bit, but for the counts that
    schedules are called with: time goes on, and step t takes the learning rate of count t however many
    steps were skipped before it. Put it around the whole chain: clipping does not make an
    infinite gradient finite. The update takes ``loss=`` if there is one to check; this and all other
    extra arguments reach `tx`.

    ``optax.apply_if_finite`` gives up after a number of bad steps in a row and makes the next bad one;
    this never does, so check ``in_a_row`` in the training loop.

    As a transformation this makes AdamW take 1.5 to 3 times as long; :func:`guarded_step` makes the same
    step in 1.15 times AdamW's time (docs/log.md, 2026-11-28 and 29).

    Args:
      tx: the optimizer.

    Source: ``lax.cond`` as in google-deepmind/simply, ``optimizers.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.stability.finite_gate(ravine.sgd(0.5)), jnp.array([1.0, 1.0])
      >>> updates, state = tx.update(jnp.array([2.0, jnp.nan]), tx.init(params), params)
      >>> params + updates, int(state.skipped)
      (Array([1., 1.], dtype=float32), 1)
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> FiniteGateState:
        # Arrays of their own: donated, one buffer cannot stand in two places.
        skipped, in_a_row = (jnp.zeros([], jnp.int32) for _ in range(2))
        return FiniteGateState(skipped, in_a_row, inner.init(params))

    def decide(updates: Any, state: FiniteGateState, loss: Any) -> tuple[jax.Array, Any]:
        # The norm is finite just where all leaves are, and cheaper than looking at each element.
        finite = is_summable(jnp.square(global_norm(updates)))
        if loss is not None:
            check_scalar_loss(loss)
            finite &= jnp.isfinite(jnp.asarray(loss))
        skipped = state.skipped + (~finite).astype(jnp.int32)
        in_a_row = jnp.where(finite, 0, state.in_a_row + 1)
        return finite, lambda inner_state: FiniteGateState(skipped, in_a_row, inner_state)

    return guarded("finite_gate", init, inner, decide, finite_gate)


class SkipStepState(NamedTuple):
    """State of `skip_step`."""

    losses: Window  # of the steps that were made
    norms: Window  # of their gradients
    skipped: jax.Array  # int32 scalar, steps not made so far
    not_finite: jax.Array  # int32 scalar, of them those that were not finite
    in_a_row: jax.Array  # int32 scalar, skipped since the last step that was made
    outliers: jax.Array  # int32 scalar, of them those that were finite
    inner: Any  # the inner optimizer's


@checked
def skip_step(
    tx: optax.GradientTransformation,
    *,
    deviations: float = 6.0,
    window: int = 128,
    warmup: int = 64,
    patience: int = 16,
    robust: bool = False,
) -> Guarded:
    r"""`tx`, but steps whose loss or gradient norm is far above the recent ones are skipped.

    A step is made if its loss and all its gradients are finite (their norm below 1.3e19, as for
    :func:`finite_gate`) and, once `warmup` steps have been made,

    .. math:: \ell \le \mu_\ell + k\,\sigma_\ell \quad\text{and}\quad
        \lVert g \rVert \le \mu_g + k\,\sigma_g,

    with mean and standard deviation over the window of steps *that were made*: nothing infinite, no
    NaN and no spike enters it. The deviation counts for at least a hundredth of the mean.

    A skipped step leaves parameters and the state of `tx` as they are, bit by bit, but for the counts
    that schedules are called with: time goes on, and step t takes the learning rate of count t however
    many steps were skipped before it. After `patience` finite outliers with no step between them the
    next finite one is taken for a new level: the step is made and the windows start again with it.
    Non-finite values never enter.

    The update takes ``loss=``, which is handed on to `tx` with all other extra arguments.

    As a transformation this makes AdamW take 1.5 to 3 times as long; :func:`guarded_step` makes the same
    step in 1.15 times AdamW's time (docs/log.md, 2026-11-28 and 29).

    Args:
      tx: the optimizer; wrap the whole chain.
      deviations: k.
      window: steps looked back on, at least 1.
      warmup: steps made before any outlier is skipped, 1 to `window`; after a new level, again.
      patience: finite outliers skipped in a row before one is let in, at least 1.
      robust: median and 1.4826 times the median absolute deviation in place of mean and deviation.

    Raises:
      ValueError: for values out of range, or an update without a loss.

    Source: the rule is that of OLMo-core, ``skip_step_optimizer.py`` (whose products with zero let NaN
    through, and whose window takes in the spikes).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.stability.skip_step(ravine.sgd(0.5), warmup=2)
      >>> params = jnp.array([1.0])
      >>> state = tx.init(params)
      >>> for loss in (2.0, 2.1, 9.0, 2.0):
      ...     updates, state = tx.update(jnp.array([1.0]), state, params, loss=loss)
      ...     print(updates)
      [-0.5]
      [-0.5]
      [-0.]
      [-0.5]
    """
    check_positive(deviations=deviations)
    check_whole(1, window=window, warmup=warmup, patience=patience)
    if warmup > window:
        raise ValueError(
            f"warmup must be at most the window of {window} steps, got {warmup}: more are never seen."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> SkipStepState:
        losses, norms = (empty_window(window) for _ in range(2))
        skipped, not_finite, in_a_row, outliers = (jnp.zeros([], jnp.int32) for _ in range(4))
        return SkipStepState(
            losses, norms, skipped, not_finite, in_a_row, outliers, inner.init(params)
        )

    def decide(updates: Any, state: SkipStepState, loss: Any) -> tuple[jax.Array, Any]:
        check_extra_given(loss, "loss", "skip_step")
        check_scalar_loss(loss)
        seen = jnp.asarray(loss).astype(jnp.float32)
        norm = global_norm(updates)
        finite = jnp.isfinite(seen) & is_summable(jnp.square(norm))
        low = seen <= threshold(state.losses, deviations, robust=robust)
        low &= norm <= threshold(state.norms, deviations, robust=robust)
        normal = low | (state.losses.count < warmup)
        shifted = finite & ~normal & (state.outliers >= patience)
        made = finite & (normal | shifted)

        def next_window(window: Window, value: jax.Array) -> Window:
            # What is written in warm-up decides which values count, so the old ones may stay.
            window = window._replace(count=jnp.where(shifted, 0, window.count))
            return jax.tree.map(
                lambda new, old: jnp.where(made, new, old), push(window, value), window
            )

        more = lambda count, condition: count + condition.astype(jnp.int32)
        return made, lambda inner_state: SkipStepState(
            losses=next_window(state.losses, seen),
            norms=next_window(state.norms, norm),
            skipped=more(state.skipped, ~made),
            not_finite=more(state.not_finite, ~finite),
            in_a_row=jnp.where(made, 0, state.in_a_row + 1),
            outliers=jnp.where(made, 0, more(state.outliers, finite)),
            inner=inner_state,
        )

    options: dict[str, Any] = {"deviations": deviations, "window": window, "warmup": warmup}
    options |= {"patience": patience, "robust": robust}
    around = lambda other: skip_step(other, **options)
    return guarded("skip_step", init, inner, decide, around)
