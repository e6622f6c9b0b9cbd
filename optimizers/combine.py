"""Several optimizers for one tree, chosen by the roles of its parameters."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax

from ..core.arguments import checked
from ..core.paths import path_string
from ..core.transformation import with_extra_args
from ..core.tree_checks import is_part
from .links.curvature import with_whole_curvature
from .roles import Role, Rules, assign_roles, check_roles, complete


@checked
def combine_by_role(
    optimizers: Mapping[str, optax.GradientTransformation],
    assignment: Mapping[Role, str],
    rules: Rules | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Updates every parameter with the optimizer of its role: ``optax.partition`` with role rules.

    :func:`ravine.explain` prints who gets what.

    Args:
      optimizers: name -> optimizer, complete with its learning rate.
      assignment: role -> name. Roles that share a name share one optimizer and one state.
      rules: role rules, see :func:`ravine.optimizers.roles.assign_roles`.

    Raises:
      ValueError: for an assignment to a name that does not exist, an optimizer without a role, and at
        `init` for parameters that no rule covers, a role without an optimizer, or an optimizer without
        parameters.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> assignment = {"matrix": "lion", "bias": "sgd"}
      >>> tx = ravine.combine_by_role(
      ...     {"lion": ravine.lion(1e-4), "sgd": ravine.sgd(0.1)}, assignment
      ... )
      >>> state = tx.init(params)
      >>> print(ravine.role_table(params, tx=tx))
      path          shape   role    matrices                      optimizer  decay
      dense/bias    (3,)    bias    -                             sgd        no
      dense/kernel  (2, 3)  matrix  [batch 1, rows 2, columns 3]  lion       no
    """
    complete(rules)
    check_roles("the assignment", list(assignment))
    for role, name in assignment.items():
        if name not in optimizers:
            raise ValueError(
                f"the role {role!r} is assigned to {name!r}, but optimizers has only "
                f"{', '.join(map(repr, optimizers))}; add it or correct the name."
            )
    idle = [name for name in optimizers if name not in assignment.values()]
    if idle:
        raise ValueError(
            f"no role is assigned to the optimizer {idle[0]!r}; assign one or drop it."
        )

    def labels(params: Any) -> Any:
        def label(path: Any, role: Role) -> str:
            if role not in assignment:
                raise ValueError(
                    f"the parameter {path_string(path)!r} has the role {role!r}, which is assigned to "
                    "no optimizer; assign it."
                )
            return assignment[role]

        found = jax.tree_util.tree_map_with_path(label, assign_roles(params, rules))
        unused = set(optimizers).difference(jax.tree.leaves(found))
        if unused and jax.tree.leaves(found) and not is_part(params):
            raise ValueError(
                f"the optimizer {min(unused)!r} gets no parameter: no path has its roles; correct the "
                "rules or drop it."
            )
        return found

    transforms: dict[Hashable, optax.GradientTransformation] = {**optimizers}
    inner = optax.partition(transforms, labels)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, **with_whole_curvature(extra, params))

    def describe(params: Any) -> dict[str, list[Any]]:
        roles = jax.tree.leaves(assign_roles(params, rules))
        return {"optimizer": jax.tree.leaves(labels(params)), "role": roles}

    return with_extra_args(inner.init, update, describe)
