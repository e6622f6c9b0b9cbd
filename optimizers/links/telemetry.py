"""Telemetry: a record of the last update in the optimizer's state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.sizes import NO_METRICS, sizes_by_role, total_norm
from ...core.transformation import states_of, with_extra_args
from ...core.tree_checks import check_params_given
from ..roles import Rules, complete, known_roles
from .learning_rate import RATE_STATES


class TelemetryState(NamedTuple):
    """State of `with_telemetry`."""

    metrics: Mapping[str, jax.Array]  # float32 scalars, of the last update
    inner: Any  # the inner optimizer's


@checked
def with_telemetry(
    tx: optax.GradientTransformation, rules: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """`tx`, with the sizes of gradients, updates and parameters in its state, for :func:`telemetry`.

    For every role in the model there are ``gradient_norm``, ``update_norm`` and ``parameter_norm``
    (before the update), and the same as ``..._rms``, the norm divided by the root of the number of
    coordinates, for example ``metrics["update_rms/matrix"]``; and ``gradient_norm`` over all
    parameters. A parameter that no rule covers has the role ``other``, so any model can be monitored.

    Learning rates are those of every :func:`scale_by_learning_rate` inside: ``learning_rate`` if
    there is one, else ``learning_rate/muon`` and so on, by the names of ``optax.partition``. They are
    read from the optimizer's state, which keeps the rate of the last update.

    Norms are float32 for gradients of any dtype. Non-finite values show in their role, and telemetry
    does not change the updates.

    Args:
      tx: the whole optimizer.
      rules: role rules, see :func:`ravine.optimizers.roles.assign_roles`.

    Raises:
      ValueError: for a misspelt role in the rules, or an update without parameters.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> tx = ravine.with_telemetry(ravine.sgd(0.5), [("kernel$", "matrix")])
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> {name: float(value) for name, value in ravine.telemetry(state).items()}
      ... # doctest: +NORMALIZE_WHITESPACE
      {'gradient_norm': 2.0, 'gradient_norm/matrix': 2.0, 'gradient_rms/matrix': 1.0,
       'learning_rate': 0.5, 'parameter_norm/matrix': 2.0, 'parameter_rms/matrix': 1.0,
       'update_norm/matrix': 1.0, 'update_rms/matrix': 0.5}
    """
    inner = optax.with_extra_args_support(tx)
    complete(rules)

    def measure(**trees: Any) -> dict[str, jax.Array]:
        roles = known_roles(trees["parameter"], rules)
        known = sorted(set(jax.tree.leaves(roles)))
        found: dict[str, jax.Array] = {}
        for what, tree in trees.items():
            found |= sizes_by_role(what, tree, roles, known)
        found["gradient_norm"] = total_norm([found[f"gradient_norm/{role}"] for role in known])
        return dict(sorted(found.items()))

    def init(params: optax.Params) -> TelemetryState:
        inner_state = inner.init(params)
        if not jax.tree.leaves(params):
            # The placeholder of optax.tree.map_params, which does not carry the roles of the model.
            return TelemetryState(NO_METRICS, inner_state)
        zeros = jax.tree.map(jnp.zeros_like, params)
        trees = {"gradient": zeros, "update": zeros, "parameter": zeros}
        shapes = jax.eval_shape(measure, **trees)
        none = {name: jnp.zeros([], jnp.float32) for name in shapes}
        return TelemetryState(none, inner_state)

    def update(
        updates: optax.Updates,
        state: TelemetryState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, TelemetryState]:
        check_params_given(params, "with_telemetry")
        done, inner_state = inner.update(updates, state.inner, params, **extra)
        metrics = measure(gradient=updates, update=done, parameter=params)
        return done, TelemetryState(metrics, inner_state)

    return with_extra_args(init, update)


def telemetry(opt_state: Any) -> dict[str, jax.Array]:
    """Metrics and learning rates in a state, at any depth; ``nnx.Optimizer`` too.

    Args:
      opt_state: an optimizer's state, or ``optimizer.opt_state`` of a ``flax.nnx.Optimizer``.

    Raises:
      ValueError: unless there is exactly one `with_telemetry` in the state.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.with_telemetry(ravine.adamw(1e-3))
      >>> float(ravine.telemetry(tx.init({"bias": jnp.ones(2)}))["learning_rate"])
      0.0010000000474974513
    """
    found = states_of(TelemetryState, opt_state)
    if len(found) != 1:
        raise ValueError(
            f"this state holds {len(found)} with_telemetry, not one; wrap the whole optimizer in it."
        )
    values = {**found[0].metrics, **_learning_rates(found[0].inner)}
    return {name: jnp.asarray(values[name][...]) for name in sorted(values)}


def _learning_rates(state: Any) -> dict[str, jax.Array]:
    is_rate = lambda node: isinstance(node, RATE_STATES)
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_rate)
    found = [(path, node[1]) for path, node in nodes if is_rate(node)]
    if len(found) == 1:
        return {"learning_rate": found[0][1]}
    rates: dict[str, jax.Array] = {}
    for path, rate in found:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = "/".join(["learning_rate", *keys])
        rates[name if name not in rates else f"{name}/{len(rates)}"] = rate
    return rates
