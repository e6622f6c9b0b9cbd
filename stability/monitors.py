"""Monitors: the numbers that show trouble first, sampled and kept in a state of constant structure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path

from ..core.arguments import checked
from ..core.checks import check_positive, check_whole
from ..core.paths import path_string
from ..core.sizes import NO_METRICS, sizes_by_role, total_norm
from ..core.transformation import states_of, with_extra_args
from ..core.tree_checks import check_params_given
from ..optimizers.roles import Rules, complete, known_roles
from ._arithmetic import global_norm
from ._layers import STACKED, Stacked
from ._moment_measures import eps_shares, momentum_ranks
from ._moments import moment_leaves
from ._window import Window, empty_window, push, threshold


class MonitorState(NamedTuple):
    """State of `with_monitors`."""

    count: jax.Array  # int32 scalar, updates made so far
    losses: Window  # finite ones
    norms: Window  # of the gradients, finite ones
    spikes: jax.Array  # int32 [2], steps whose loss, or gradient norm, was far above the window's
    metrics: Mapping[str, jax.Array]  # float32 scalars, of the last step that was sampled
    inner: Any  # the inner optimizer's


@checked
def with_monitors(
    tx: optax.GradientTransformation,
    rules: Rules | None = None,
    *,
    every: int = 10,
    eps: float = 1e-8,
    deviations: float = 6.0,
    window: int = 128,
    measured: Sequence[str] = (),
    layers: Stacked = STACKED,
) -> optax.GradientTransformationExtraArgs:
    r"""`tx`, with early signs of trouble in its state, for :func:`monitored` to read.

    Every step, with loss and gradient norm x: ``spike_score/loss`` and ``spike_score/gradient_norm``,
    the share of steps so far with :math:`x > \mu + k \sigma` of the last ones, or x not finite.

    Every so many steps, for each role in the model, ``other`` where no rule covers a parameter:
    ``gradient_norm``, ``update_norm``,
    ``parameter_norm`` and each as ``..._rms``; ``update_ratio``, the RMS of the update over that of
    the weights; and, where the state has such moments, ``eps_share``, the share of elements with
    :math:`\sqrt{v} < 10 \epsilon`, of which Adam's denominator is no longer the gradient's size, and
    ``momentum_rank``, the mean of the effective ranks

    .. math:: \Big(\sum_i \sigma_i^2\Big)^2 \Big/ \sum_i \sigma_i^4 =
        \lVert M \rVert_F^4 \,/\, \lVert M^\top M \rVert_F^2

    of matrices' momenta. Names are ``update_ratio/matrix`` and so on. Measurements of the model, such as
    :func:`logit_statistics` and the largest logits of :func:`attention`, are passed as
    ``measured={"max_logit": ...}`` and kept at the sampled steps.

    Updates are the same as without monitors.

    Args:
      tx: the whole optimizer.
      rules: role rules, see :func:`ravine.optimizers.roles.assign_roles`; ``[("", "matrix")]`` takes
        all parameters together.
      every: steps between two samples, at least 1.
      eps: that of the optimizer, for ``eps_share``.
      deviations: k of the spike score; 6 in OLMo.
      window: number of steps that a spike is compared with.
      measured: names of the model's measurements, one scalar each.
      layers: which leaves are stacked layers.

    Raises:
      ValueError: for values out of range, a misspelt role in the rules, an update without parameters,
        or other measurements than were named.

    Source: OLMo-core, ``stability_monitor.py`` (spike score); Wortsman et al., 2023,
    https://arxiv.org/abs/2309.14322 (gradients below epsilon).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import monitored, with_monitors
      >>> params, grads = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.eye(2)}
      >>> tx = with_monitors(ravine.adamw(0.5), every=1)
      >>> _, state = tx.update(grads, tx.init(params), params, loss=3.0)
      >>> found = monitored(state)
      >>> [round(float(found[f"{name}/matrix"]), 2) for name in ("momentum_rank", "eps_share")]
      [2.0, 0.5]
    """
    check_positive(eps=eps, deviations=deviations)
    check_whole(1, every=every, window=window)
    inner = optax.with_extra_args_support(tx)
    names = tuple(measured)
    complete(rules)

    def measure(trees: Mapping[str, Any], inner_state: Any) -> dict[str, jax.Array]:
        roles = known_roles(trees["parameter"], rules)
        known = sorted(set(jax.tree.leaves(roles)))
        found: dict[str, jax.Array] = {}
        for what, tree in trees.items():
            found |= sizes_by_role(what, tree, roles, known)
        found["gradient_norm"] = total_norm([found[f"gradient_norm/{role}"] for role in known])
        for role in known:
            rms = found[f"parameter_rms/{role}"]
            found[f"update_ratio/{role}"] = found[f"update_rms/{role}"] / jnp.where(rms > 0, rms, 1)
        role_of = {path_string(path): role for path, role in tree_leaves_with_path(roles)}
        found |= eps_shares(moment_leaves(inner_state, "nu"), 10 * eps, role_of, known)
        return found | momentum_ranks(moment_leaves(inner_state, "mu"), layers, role_of, known)

    def init(params: optax.Params) -> MonitorState:
        inner_state = inner.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        trees = {"gradient": zeros, "update": zeros, "parameter": zeros}
        if jax.tree.leaves(params):
            found = [*jax.eval_shape(measure, trees, inner_state), *names]
            metrics = {name: jnp.zeros([], jnp.float32) for name in sorted(found)}
        else:  # The placeholder of optax.tree.map_params.
            metrics = NO_METRICS
        losses, norms = (empty_window(window) for _ in range(2))
        count, spikes = jnp.zeros([], jnp.int32), jnp.zeros(2, jnp.int32)
        return MonitorState(count, losses, norms, spikes, metrics, inner_state)

    def update(
        updates: optax.Updates,
        state: MonitorState,
        params: optax.Params | None = None,
        *,
        loss: Any = None,
        measured: Mapping[str, jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MonitorState]:
        check_params_given(params, "with_monitors")
        _check_measured(names, measured)
        passed = extra if loss is None else {"loss": loss, **extra}
        done, inner_state = inner.update(updates, state.inner, params, **passed)

        seen = jnp.asarray(0.0 if loss is None else loss).astype(jnp.float32)
        losses, loss_spikes = _watch(state.losses, seen, deviations)
        norms, norm_spikes = _watch(state.norms, global_norm(updates), deviations)
        spikes = state.spikes + jnp.stack([loss_spikes, norm_spikes]).astype(jnp.int32)

        def sample() -> dict[str, jax.Array]:
            trees = {"gradient": updates, "update": done, "parameter": params}
            found = measure(trees, inner_state) | {k: measured[k] for k in names if measured}
            return {name: found[name].astype(jnp.float32) for name in state.metrics}

        due = state.count % every == 0
        metrics = jax.lax.cond(due, sample, lambda: dict(state.metrics))
        count = state.count + 1
        return done, MonitorState(count, losses, norms, spikes, metrics, inner_state)

    return with_extra_args(init, update)


def monitored(opt_state: Any) -> dict[str, jax.Array]:
    """The metrics in a state, however deep `with_monitors` is in it; also of ``nnx.Optimizer``.

    Raises:
      ValueError: unless there is exactly one `with_monitors` in the state.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import monitored, with_monitors
      >>> state = with_monitors(ravine.sgd(0.1)).init({"bias": jnp.ones(2)})
      >>> float(monitored(state)["spike_score/loss"])
      0.0
    """
    found = states_of(MonitorState, opt_state)
    if len(found) != 1:
        raise ValueError(f"this state holds {len(found)} with_monitors, not one.")
    values = {name: jnp.asarray(value[...]) for name, value in found[0].metrics.items()}
    steps = jnp.maximum(jnp.asarray(found[0].count[...]), 1)
    scores = jnp.asarray(found[0].spikes[...]).astype(jnp.float32) / steps.astype(jnp.float32)
    values |= {"spike_score/loss": scores[0], "spike_score/gradient_norm": scores[1]}
    return dict(sorted(values.items()))


def _check_measured(names: Sequence[str], measured: Any) -> None:
    given = () if measured is None else tuple(measured)
    if sorted(given) != sorted(names):
        raise ValueError(
            f"with_monitors was built for measured={list(names)}, but the update got {list(given)}."
        )


def _watch(window: Window, value: jax.Array, deviations: float) -> tuple[Window, jax.Array]:
    """The window with the value, if it is finite, and whether it is a spike."""
    full = window.count >= window.values.shape[0] // 2
    finite = jnp.isfinite(value)
    spike = ~finite | (full & (value > threshold(window, deviations)))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), push(window, value), window)
    return kept, spike
