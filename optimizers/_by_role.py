"""A direction for the roles it suits, another optimizer for the rest."""

from collections.abc import Collection, Hashable
from typing import Any

import jax
import optax

from .adam import adamw
from .curvature import with_whole_curvature
from .decay import Mask, decay_or_identity
from .learning_rate import as_fallback, scale_by_learning_rate
from .roles import Role, Rules, assign_roles


def by_role(
    name: str,
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: Mask | None,
    rules: Rules,
    roles: Collection[Role],
    fallback: optax.GradientTransformation | None,
    decay: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    fallback_mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """``direction → decay → learning rate`` for parameters of `roles`, `fallback` for all others.

    Args:
      name: of the first part, in the state of ``optax.partition``.
      direction: for trees of those parameters alone.
      learning_rate: of the direction.
      weight_decay: of both.
      weight_decay_mask: of both.
      rules: role rules.
      roles: those the direction takes.
      fallback: complete with its learning rate; None for AdamW with b2 0.95.
      decay: takes the place of decoupled decay.
      fallback_learning_rate: AdamW's; None for the same as the direction's.
      fallback_mu_dtype: AdamW's.
    """
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
    chain = optax.chain(direction, decay, scale_by_learning_rate(learning_rate))

    def labels(params: Any) -> Any:
        found = assign_roles(params, rules)
        return jax.tree.map(lambda role: name if role in roles else "fallback", found)

    parts: dict[Hashable, optax.GradientTransformation] = {
        name: chain,
        "fallback": as_fallback(fallback),
    }
    return with_whole_curvature(optax.partition(parts, labels))
