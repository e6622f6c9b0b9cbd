"""Trees of roles, masks and layouts that the rules give for a model's parameters."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax

from ..matrix.shape.layout import MatrixAxes
from .deciding import axes_of_rule, check_roles, complete, decide
from .rules import CONVOLUTION, MATRIX_ROLES, Role, Rules


def assign_roles(params: Any, rules: Rules | None = None) -> Any:
    """The role of every parameter, as a tree shaped like `params`.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: an ordered list of `Rule`, or plain tuples of its first fields; the first that matches
        decides. By default ``ravine.COMMON_RULES``.

    Raises:
      ValueError: if parameters match no rule (all are listed), a role is misspelt, or a required rule
        decides no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import assign_roles
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> assign_roles({"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}, rules)
      {'kernel': 'matrix', 'scale': 'norm'}
    """
    roles = [found.role for found in decide(params, rules)]
    return jax.tree.unflatten(jax.tree.structure(params), roles)


def known_roles(params: Any, rules: Rules | None = None) -> Any:
    """Like `assign_roles`, with the role ``other`` where no rule matches.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import known_roles
      >>> known_roles({"kernel": jnp.ones((2, 2)), "strange": jnp.ones(2)})
      {'kernel': 'matrix', 'strange': 'other'}
    """
    roles = [found.role for found in decide(params, rules, lenient=True)]
    return jax.tree.unflatten(jax.tree.structure(params), roles)


def mask_by_role(roles: Iterable[Role], rules: Rules | None = None) -> Any:
    """A mask for ``optax.masked`` or ``weight_decay_mask=``: true for the given roles.

    Args:
      roles: the roles to select.
      rules: as for `assign_roles`.

    Returns:
      A function from parameters to a tree of booleans.

    Raises:
      ValueError: for a misspelt role; and as `assign_roles`, when the mask is made.

    Example:
      >>> import ravine
      >>> from ravine.optimizers.roles import mask_by_role
      >>> tx = ravine.adamw(1e-3, weight_decay_mask=mask_by_role(["matrix"]))
    """
    check_roles("mask_by_role", roles)
    complete(rules)
    selected = frozenset(roles)
    return lambda params: jax.tree.map(lambda role: role in selected, assign_roles(params, rules))


def axes_of_path(path: str, rules: Rules | None = None, ndim: int | None = None) -> MatrixAxes:
    """Rows and columns of the parameter at a path, from the rule that decides it.

    Rules that depend on neighbouring parameters do not apply here.

    Args:
      path: as given by `path_string`.
      rules: as for `assign_roles`.
      ndim: how many axes the parameter has, without those of stacked layers; None skips rules that
        depend on it, and takes `[..., in, out]` where a rule names no axes.

    Raises:
      ValueError: if no rule matches, or the meaning of the axes is unknown.

    Example:
      >>> from ravine.optimizers.roles import axes_of_path
      >>> axes_of_path("Conv_0/kernel", ndim=4).rows
      (-4, -3, -2)
    """
    for rule in complete(rules):
        asks = rule.where is not None or rule.ndim not in (None, ndim)
        if not asks and re.search(rule.pattern, path):
            if ndim is None and rule.role == "convolution":
                return rule.axes or CONVOLUTION
            found = axes_of_rule(rule, 2 if ndim is None else ndim)
            if found is None:
                raise ValueError(
                    f"the role rule {rule.pattern!r} does not say which of the {ndim} axes of "
                    f"{path!r} are rows and columns; give it MatrixAxes(rows, columns)."
                )
            return found
    raise ValueError(f"no role rule matches the parameter {path!r}; add one for it.")


def layouts(
    params: Any,
    rules: Rules | None = None,
    roles: Collection[Role] = MATRIX_ROLES,
) -> Any:
    """The layout of every parameter that holds matrices, None for all others.

    JAX treats None as an empty tree, so map over the result with
    ``is_leaf=lambda leaf: leaf is None``.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      roles: the roles that hold matrices.

    Returns:
      A tree shaped like `params`, of `Layout` and None.

    Raises:
      ValueError: as `assign_roles`; for parameters with axes of unknown meaning; and if a parameter's
        shape does not have the axes of its rule, such as a vector with the role of a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import layouts
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> found = layouts({"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}, rules)
      >>> found["kernel"].pieces, found["scale"]
      (((3, 2, 5),), None)
    """
    check_roles("roles", roles)
    found = [
        d.layout() if d.role in roles else None for d in decide(params, rules, roles, vectors=False)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def axes_from_names(
    names: Sequence[str | None],
    rows: Collection[str],
    columns: Collection[str],
    batch: Collection[str] = ("layers", "experts"),
) -> MatrixAxes:
    """Axes by logical names: Linen's ``box.names``, NNX's ``get_metadata()["out_sharding"]``.

    Args:
      names: one name for each axis of the leaf.
      rows: names of inputs of this leaf; another leaf may have them as outputs.
      columns: names of outputs of this leaf.
      batch: names of axes along which matrices are stacked.

    Raises:
      ValueError: for a name in none or several of the three, or on two axes; if rows or columns have no
        axis.

    Example:
      >>> from ravine.optimizers.roles import axes_from_names
      >>> axes_from_names(("embed", "layers", "heads", "kv"), {"embed"}, {"heads", "kv"})
      MatrixAxes(rows=(0,), columns=(2, 3), row_parts=1, column_parts=1)
    """
    names = tuple(names)
    groups = {"rows": rows, "columns": columns, "batch": batch}
    for name in names:
        homes = [group for group, members in groups.items() if name in members]
        if len(homes) != 1 or names.count(name) > 1:
            raise ValueError(
                f"the axis name {name!r} of {names} must occur once and be in one of rows, "
                f"columns and batch, but is in {' and '.join(homes) or 'none'}; add or remove it, "
                "or write MatrixAxes by number."
            )
    chosen = [tuple(a for a, name in enumerate(names) if name in side) for side in (rows, columns)]
    if not all(chosen):
        raise ValueError(f"no axis of {names} is in rows, or none in columns; name one in each.")
    return MatrixAxes(chosen[0], chosen[1])
