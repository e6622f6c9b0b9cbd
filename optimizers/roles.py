"""Roles: which parameter is what, decided by its path, never by its number of axes.

Under scanned layers a norm's scale is 2-D and a matrix 3-D, and an embedding is as 2-D as any
matrix; so ordered rules `(regular expression, role)` over the path say what a parameter is. The
first rule that matches decides, every parameter must be matched, and every rule must match.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax

Role = Literal["embedding", "head", "matrix", "norm", "bias", "router", "convolution"]
Rules = Sequence[tuple[str, Role]]

RAVINE_RULES: Rules = (
    (r"(^|/)embed/embedding$", "embedding"),
    (r"(^|/)head/kernel$", "head"),
    (r"norm/scale$", "norm"),
    (r"/kernel$", "matrix"),
)
"""Rules for the model of ``ravine.training``."""


def path_string(path: Iterable[Any]) -> str:
    """A key path as ``layers/attention/query/kernel``; NNX's trailing ``value`` is left out.

    Example:
      >>> import jax
      >>> from ravine.optimizers.roles import path_string
      >>> [path_string(path) for path, _ in jax.tree.leaves_with_path({"a": {"b": [1, 2]}})]
      ['a/b/0', 'a/b/1']
    """
    parts = [
        str(key.name)
        if hasattr(key, "name")
        else str(getattr(key, "key", getattr(key, "idx", key)))
        for key in path
    ]
    if len(parts) > 1 and parts[-1] in ("value", "raw_value"):
        parts = parts[:-1]
    return "/".join(parts)


def assign_roles(params: Any, rules: Rules = RAVINE_RULES) -> Any:
    """The role of every parameter, as a tree shaped like `params`.

    Args:
      params: a tree of arrays.
      rules: ordered pairs of a regular expression, searched in the path, and a role.

    Raises:
      ValueError: if a parameter matches no rule, or a rule matches no parameter it could decide.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import assign_roles
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> assign_roles({"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}, rules)
      {'kernel': 'matrix', 'scale': 'norm'}
    """
    used = set()

    def role_of(path: Any, leaf: Any) -> Role:
        del leaf
        name = path_string(path)
        for index, (pattern, role) in enumerate(rules):
            if re.search(pattern, name):
                used.add(index)
                return role
        raise ValueError(f"no role rule matches the parameter {name!r}; add one for it.")

    roles = jax.tree_util.tree_map_with_path(role_of, params)
    unused = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if unused and jax.tree.leaves(params):
        raise ValueError(
            f"the role rule {unused[0]!r} decides no parameter: no path matches it, or an earlier "
            "rule takes them all; correct or remove it."
        )
    return roles


def mask_by_role(roles: Iterable[Role], rules: Rules = RAVINE_RULES) -> Any:
    """A mask for ``optax.masked`` or ``weight_decay_mask=``: true for the given roles.

    Args:
      roles: the roles to select.
      rules: as for `assign_roles`.

    Returns:
      A function from parameters to a tree of booleans.

    Example:
      >>> import ravine
      >>> from ravine.optimizers.roles import mask_by_role
      >>> tx = ravine.adamw(1e-3, weight_decay_mask=mask_by_role(["matrix"]))
    """
    selected = frozenset(roles)
    return lambda params: jax.tree.map(lambda role: role in selected, assign_roles(params, rules))
