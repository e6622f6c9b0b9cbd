"""Monitors: the numbers in which trouble shows first, in the state, sampled, of constant structure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..optimizers._arithmetic import wide
from ..optimizers._checks import check_params_given
from ..optimizers._transformation import with_extra_args
from ._arithmetic import global_norm
from ._checks import check_positive, check_whole
from ._layers import STACKED, Stacked, path_string, within_layer
from ._moments import moment_leaves
from ._window import Window, empty_window, push, threshold
from .log_sum_exp import log_sum_exp

EVERYTHING = {"all": ""}


class MonitorState(NamedTuple):
    """State of `with_monitors`."""

    count: jax.Array  # int32 scalar, updates made so far
    losses: Window  # finite ones
    norms: Window  # of the gradients, finite ones
    spikes: jax.Array  # int32 [2], steps whose loss, or gradient norm, was far above the window's
    metrics: Mapping[str, jax.Array]  # float32 scalars, of the last step that was sampled
    inner: Any  # the inner optimizer's


def with_monitors(
    tx: optax.GradientTransformation,
    groups: Mapping[str, str] = EVERYTHING,
    *,
    every: int = 10,
    eps: float = 1e-8,
    deviations: float = 6.0,
    window: int = 128,
    measured: Sequence[str] = (),
    layers: Stacked = STACKED,
) -> optax.GradientTransformationExtraArgs:
    r"""`tx`, with what shows trouble early in its state, for :func:`monitored` to read.

    Every step, with loss and gradient norm x: ``spike_score/loss`` and ``spike_score/gradient_norm``,
    the share of steps so far with :math:`x > \mu + k \sigma` of the last ones, or x not finite.

    Every so many steps, for each group: ``gradient_norm``, ``update_norm``, ``parameter_norm`` and
    each as ``..._rms``; ``update_ratio``, the RMS of the update over that of the weights; and,
    where the state has such moments, ``eps_share``, the share of elements with :math:`\sqrt{v} < 10
    \epsilon`, of which Adam's denominator is no longer the gradient's size, and ``momentum_rank``,
    the mean of the effective ranks

    .. math:: \Big(\sum_i \sigma_i^2\Big)^2 \Big/ \sum_i \sigma_i^4 =
        \lVert M \rVert_F^4 \,/\, \lVert M^\top M \rVert_F^2

    of matrices' momenta. Names are ``update_ratio/matrix`` and so on. What the model measured, as
    :func:`logit_statistics` and the largest logits of :func:`attention`, is handed in as
    ``measured={"max_logit": ...}`` and kept at the sampled steps.

    Updates are what they are without monitors.

    Args:
      tx: the whole optimizer.
      groups: name -> regular expression, searched in paths, the first that matches decides; ``""``
        matches all. Parameters that none matches are not looked at.
      every: steps between two samples, at least 1.
      eps: that of the optimizer, for ``eps_share``.
      deviations: k of the spike score; 6 in OLMo.
      window: steps that a spike is compared with.
      measured: names of what the model measures, a scalar each.
      layers: which leaves are stacked layers.

    Raises:
      ValueError: for values out of range, an update without parameters, or other measurements than
        were named.

    Source: OLMo-core, ``stability_monitor.py`` (spike score); Wortsman et al., 2023,
    https://arxiv.org/abs/2309.14322 (gradients below epsilon).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import monitored, with_monitors
      >>> tx, params = with_monitors(ravine.adamw(0.5), every=1), jnp.ones((2, 2))
      >>> _, state = tx.update(jnp.eye(2), tx.init(params), params, loss=3.0)
      >>> found = monitored(state)
      >>> [round(float(found[f"{name}/all"]), 2) for name in ("momentum_rank", "eps_share")]
      [2.0, 0.5]
    """
    check_positive(eps=eps, deviations=deviations)
    check_whole(1, every=every, window=window)
    inner = optax.with_extra_args_support(tx)
    measured = tuple(measured)

    def group_of(name: str) -> str | None:
        return next((g for g, pattern in groups.items() if re.search(pattern, name)), None)

    def measure(trees: Mapping[str, Any], inner_state: Any) -> dict[str, jax.Array]:
        found = _sizes(trees, groups, group_of)
        for group in groups:
            rms = found[f"parameter_rms/{group}"]
            ratio = found[f"update_rms/{group}"] / jnp.where(rms > 0, rms, 1)
            found[f"update_ratio/{group}"] = ratio
        found |= _eps_shares(moment_leaves(inner_state, "nu"), 10 * eps, groups, group_of)
        found |= _ranks(moment_leaves(inner_state, "mu"), layers, groups, group_of)
        return found

    def init(params: optax.Params) -> MonitorState:
        inner_state = inner.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        trees = {"gradient": zeros, "update": zeros, "parameter": zeros}
        names = sorted([*jax.eval_shape(measure, trees, inner_state), *measured])
        metrics = {name: jnp.zeros([], jnp.float32) for name in names}
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

    names = measured
    return with_extra_args(init, update)


def monitored(opt_state: Any) -> dict[str, jax.Array]:
    """The metrics in a state, however deep `with_monitors` is in it; also of ``nnx.Optimizer``.

    Raises:
      ValueError: unless there is exactly one `with_monitors` in the state.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.stability import monitored, with_monitors
      >>> state = with_monitors(ravine.sgd(0.1)).init(jnp.ones(2))
      >>> float(monitored(state)["spike_score/loss"])
      0.0
    """
    is_state = lambda node: isinstance(node, MonitorState)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    found = [node for node in nodes if is_state(node)]
    if len(found) != 1:
        raise ValueError(f"this state holds {len(found)} with_monitors, not one.")
    values = {name: jnp.asarray(value[...]) for name, value in found[0].metrics.items()}
    steps = jnp.maximum(jnp.asarray(found[0].count[...]), 1)
    scores = jnp.asarray(found[0].spikes[...]).astype(jnp.float32) / steps.astype(jnp.float32)
    values |= {"spike_score/loss": scores[0], "spike_score/gradient_norm": scores[1]}
    return dict(sorted(values.items()))


def logit_statistics(
    logits: jax.Array, where: jax.Array | None = None, sampled: jax.Array | bool = True
) -> dict[str, jax.Array]:
    """Means over tokens of entropy and log-normaliser, and the largest logit: float32, no gradient.

    Args:
      logits: ``[..., V]``.
      where: ``[...]``, boolean: which tokens count; ``None`` for all.
      sampled: a scalar; if false nothing is computed, and all values are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import logit_statistics
      >>> {k: round(float(v), 3) for k, v in logit_statistics(jnp.zeros((2, 256))).items()}
      {'entropy': 5.545, 'log_normalizer': 5.545, 'max_logit': 0.0}
    """
    logits = jax.lax.stop_gradient(logits)

    def measure() -> dict[str, jax.Array]:
        z = wide(logits)
        counted = jnp.ones(z.shape[:-1], bool) if where is None else where
        z = jnp.where(counted[..., None], z, 0)
        number = jnp.maximum(jnp.sum(counted), 1).astype(z.dtype)
        normalizer = log_sum_exp(z)
        shares = jnp.exp(z - normalizer[..., None])
        entropy = normalizer - jnp.sum(jnp.where(shares > 0, shares * z, 0), axis=-1)
        mean = lambda x: jnp.sum(jnp.where(counted, x, 0)) / number
        highest = jnp.max(jnp.where(counted, jnp.max(z, axis=-1), -jnp.inf))
        found = {"entropy": mean(entropy), "log_normalizer": mean(normalizer), "max_logit": highest}
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    names = ("entropy", "log_normalizer", "max_logit")
    nothing = dict.fromkeys(names, jnp.zeros([], jnp.float32))
    return measure() if sampled is True else jax.lax.cond(sampled, measure, lambda: nothing)


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


def _sizes(trees: Mapping[str, Any], groups: Any, group_of: Any) -> dict[str, jax.Array]:
    found = {}
    for what, tree in trees.items():
        squares = dict.fromkeys(groups, jnp.zeros([], jnp.float32))
        sizes = dict.fromkeys(groups, 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            group = group_of(path_string(path))
            if group is not None:
                squares[group] += jnp.sum(jnp.square(wide(leaf))).astype(jnp.float32)
                sizes[group] += leaf.size
        for group in groups:
            norm = jnp.sqrt(squares[group])
            found[f"{what}_norm/{group}"] = norm
            found[f"{what}_rms/{group}"] = norm / max(sizes[group], 1) ** 0.5
    return found


def _eps_shares(leaves: Any, limit: float, groups: Any, group_of: Any) -> dict[str, jax.Array]:
    if not leaves:
        return {}
    below = dict.fromkeys(groups, jnp.zeros([], jnp.float32))
    sizes = dict.fromkeys(groups, 0)
    for path, nu in leaves:
        group = group_of(path_string(path))
        if group is not None:
            below[group] += jnp.sum(wide(nu) < limit**2).astype(jnp.float32)
            sizes[group] += nu.size
    return {f"eps_share/{group}": below[group] / max(sizes[group], 1) for group in groups}


def _ranks(leaves: Any, layers: Stacked, groups: Any, group_of: Any) -> dict[str, jax.Array]:
    if not leaves:
        return {}
    ranks: dict[str, list[jax.Array]] = {group: [] for group in groups}
    for path, mu in leaves:
        group = group_of(path_string(path))
        axes = within_layer(path, mu, layers)
        if group is None or len(axes) < 2 or not mu.size:
            continue
        outer = tuple(axis for axis in range(mu.ndim) if axis not in axes)
        stacked = wide(jnp.transpose(mu, (*outer, *axes)))
        matrices = stacked.reshape(-1, *stacked.shape[len(outer) :][:-1], stacked.shape[-1])
        matrices = matrices.reshape(matrices.shape[0], -1, matrices.shape[-1])
        ranks[group].append(_effective_ranks(matrices))
    none = jnp.zeros([], jnp.float32)
    return {
        f"momentum_rank/{group}": jnp.mean(jnp.concatenate(found)).astype(jnp.float32)
        if found
        else none
        for group, found in ranks.items()
    }


def _effective_ranks(m_LxMxN: jax.Array) -> jax.Array:
    highest = jnp.max(jnp.abs(m_LxMxN), axis=(1, 2), keepdims=True)
    m_LxMxN = m_LxMxN / jnp.where(highest > 0, highest, 1)
    side = "lmn,lmk->lnk" if m_LxMxN.shape[1] >= m_LxMxN.shape[2] else "lmn,lkn->lmk"
    gram = jnp.einsum(side, m_LxMxN, m_LxMxN)
    square = jnp.sum(jnp.square(m_LxMxN), axis=(1, 2))
    fourth = jnp.sum(jnp.square(gram), axis=(1, 2))
    return jnp.square(square) / jnp.where(fourth > 0, fourth, 1)
