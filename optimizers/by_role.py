"""A direction for the roles it suits, another optimizer for the rest."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..core.arithmetic import is_usable
from ..core.checks import check_non_negative
from ..core.transformation import with_extra_args
from ..core.tree_checks import is_part
from .adam import adamw
from .links.curvature import with_whole_curvature
from .links.decay import Mask, decay_or_identity
from .links.learning_rate import as_fallback, scale_by_learning_rate
from .matrix.shape.layout import MatrixAxes
from .matrix.shape.matrices import DEFAULT_AXES, Axes
from .roles import Role, Rules, check_roles, complete, decide, matrices


def by_role(
    name: str,
    direction: Callable[[Axes], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: Mask | None,
    rules: Rules | None,
    roles: Collection[Role],
    fallback: optax.GradientTransformation | None,
    decay: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    fallback_mu_dtype: Any = None,
    gated: bool = False,
) -> optax.GradientTransformation:
    """``direction → decay → learning rate`` for parameters of `roles`, `fallback` for all others.

    Args:
      name: of the first part, in the state of ``optax.partition``.
      direction: for trees of those parameters alone, made of the rows and columns of each, by path.
      learning_rate: of the direction.
      weight_decay: of both.
      weight_decay_mask: of both.
      rules: role rules; None for the default.
      roles: those the direction takes.
      fallback: complete with its learning rate; None for AdamW with b2 0.95.
      decay: takes the place of decoupled decay.
      fallback_learning_rate: AdamW's; None for the same as the direction's.
      fallback_mu_dtype: AdamW's.
      gated: whether the fallback takes gradients that are not usable for zeros, leaf by leaf, as a
        direction that leaves such blocks out of its moments.
    """
    check_non_negative(learning_rate=learning_rate, fallback_learning_rate=fallback_learning_rate)
    if decay is None:
        decay = decay_or_identity(weight_decay, weight_decay_mask)
    if fallback is None:
        fallback = adamw(
            learning_rate if fallback_learning_rate is None else fallback_learning_rate,
            b2=0.95,
            mu_dtype=fallback_mu_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
        )
    if gated:
        fallback = _gated(fallback)
    fallback = as_fallback(fallback)
    complete(rules)
    check_roles(f"the roles of {name}", roles)
    link = scale_by_learning_rate(learning_rate)
    direction(DEFAULT_AXES)  # Values out of range are refused here, before there are parameters.

    @functools.lru_cache(maxsize=8)
    def chain(axes: tuple[tuple[str, MatrixAxes], ...]) -> optax.GradientTransformation:
        return optax.chain(direction(dict(axes).__getitem__), decay, link)

    def parts(tree: Any) -> optax.GradientTransformationExtraArgs:
        decided = decide(tree, rules, roles)
        mine = tuple((d.path, d.axes) for d in decided if d.role in roles and d.axes is not None)
        if decided and not mine and not is_part(tree):
            raise ValueError(
                f"{name} gets no parameter: none has the role {' or '.join(roles)}; correct the rules, "
                "or take the optimizer that the rest is left to."
            )
        labels = [name if d.role in roles else "fallback" for d in decided]
        labels = jax.tree.unflatten(jax.tree.structure(tree), labels)
        return optax.partition({name: chain(mine), "fallback": fallback}, lambda _: labels)

    def init(params: Any) -> Any:
        return parts(params).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return parts(updates).update(updates, state, params, **extra)

    def describe(tree: Any) -> dict[str, list[Any]]:
        decided = decide(tree, rules, roles)
        return {
            "optimizer": [name if d.role in roles else "fallback" for d in decided],
            "role": [d.role for d in decided],
            "matrices": [matrices(d) if d.role in roles else "-" for d in decided],
        }

    return with_whole_curvature(with_extra_args(init, update, describe))


def _gated(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, but the gradient of a leaf that is not usable is a gradient of zeros to it."""
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        seen = jax.tree.map(lambda g: jnp.where(is_usable(g), g, 0), updates)
        return inner.update(seen, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)
