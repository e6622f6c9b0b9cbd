"""Roles: which parameter is what, decided by its path, never by its number of axes alone.

Under scanned layers a norm's scale is 2-D and a matrix 3-D, and an embedding is as 2-D as any
matrix; so ordered rules over the path say what a parameter is, and which of its axes are rows and
columns. The first rule that matches decides, and every parameter must be matched.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

import jax
import numpy as np

from ..core.arguments import checked
from ..core.checks import near
from ..core.paths import path_string
from ..core.tree_checks import is_part
from ._probe import probe
from ._table import text_table
from .matrix.layout import Layout, MatrixAxes, layout
from .refusal import refusal
from .rules import (
    ATTENTION_IN,
    ATTENTION_OUT,
    COMMON_RULES,
    CONVOLUTION,
    EQUINOX_RULES,
    HAIKU_RULES,
    HUGGING_FACE_RULES,
    IN_OUT,
    LINEN_RULES,
    MATRIX_ROLES,
    MAXTEXT_RULES,
    NNX_RULES,
    OUT_IN,
    RAVINE_RULES,
    Role,
    Rule,
    Rules,
    window,
)

__all__ = [
    "ATTENTION_IN",
    "ATTENTION_OUT",
    "COMMON_RULES",
    "CONVOLUTION",
    "EQUINOX_RULES",
    "HAIKU_RULES",
    "HUGGING_FACE_RULES",
    "IN_OUT",
    "LINEN_RULES",
    "MATRIX_ROLES",
    "MAXTEXT_RULES",
    "NNX_RULES",
    "OUT_IN",
    "RAVINE_RULES",
    "Decided",
    "Role",
    "Rule",
    "Rules",
    "assign_roles",
    "axes_from_names",
    "axes_of_path",
    "check_roles",
    "complete",
    "decide",
    "known_roles",
    "layouts",
    "mask_by_role",
    "matrices",
    "path_string",
    "role_table",
]


class Decided(NamedTuple):
    """What the rules say of one parameter."""

    path: str
    shape: tuple[int, ...]
    role: Role | None
    """None if no rule matches."""
    axes: MatrixAxes | None
    """Rows and columns; None if it is not known what the axes mean."""

    def layout(self) -> Layout:
        """As matrices."""
        assert self.axes is not None
        return layout(self.shape, self.axes, self.path)


def check_roles(name: str, roles: Iterable[str]) -> None:
    """Raises for a role that there is none of, in the argument called `name`.

    Example:
      >>> from ravine.optimizers.roles import check_roles
      >>> check_roles("matrix_roles", ["matrix"])
    """
    known = get_args(Role)
    for role in (roles,) if isinstance(roles, str) else roles:
        if role not in known:
            raise ValueError(f"{name} has {role!r}, which is no role; {near(str(role), known)}")
    if isinstance(roles, str):
        raise ValueError(f"{name} must be a sequence of roles, not a string; write [{roles!r}].")


def complete(rules: Rules | None) -> tuple[Rule, ...]:
    """Rules as `Rule`; those of the default for None.

    Raises:
      ValueError: for an empty list, a role that there is none of, or a pattern that is no regular
        expression.

    Example:
      >>> from ravine.optimizers.roles import complete
      >>> complete([("scale$", "norm")])[0].role
      'norm'
    """
    found = tuple(
        Rule(*cast(Any, rule)) for rule in (COMMON_RULES if rules is None else tuple(rules))
    )
    for rule in found:
        check_roles(f"the role rule for {rule.pattern!r}", [rule.role])
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(
                f"the role rule {rule.pattern!r} is no regular expression: {error}; correct it."
            ) from error
    return found


def decide(
    params: Any,
    rules: Rules | None = None,
    needed: Collection[Role] = (),
    *,
    lenient: bool = False,
) -> list[Decided]:
    """What every parameter is, in the order of the leaves.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      needed: roles whose rows and columns must be known.
      lenient: parameters that no rule matches get the role ``other``.

    Raises:
      ValueError: unless `lenient`, for all parameters that no rule matches or whose axes are needed
        and unknown, together; or a required rule that decides no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import decide
      >>> decide({"up": {"kernel": jnp.ones((2, 3))}})[0].axes
      MatrixAxes(rows=(-2,), columns=(-1,), row_parts=1, column_parts=1)
    """
    ready = complete(rules)
    leaves = [
        (path_string(path), tuple(np.shape(leaf)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    layers, modules = _layer_axes(leaves, ready), _modules(leaves)
    used, decided = set(), []
    for name, shape in leaves:
        ndim = len(shape) - layers.get(name, 0)
        beside = modules[_module(name)[0]]
        index = next(
            (
                i
                for i, rule in enumerate(ready)
                if (rule.ndim is None or rule.ndim == ndim)
                and re.search(rule.pattern, name)
                and (rule.where is None or rule.where(beside))
            ),
            None,
        )
        if index is None:
            decided.append(Decided(name, shape, "other" if lenient else None, None))
            continue
        used.add(index)
        rule = ready[index]
        decided.append(Decided(name, shape, rule.role, _axes(rule, ndim)))
    if lenient:
        return decided
    unclear = [d for d in decided if d.role is None or (d.role in needed and d.axes is None)]
    if unclear:
        raise ValueError(refusal(unclear, dict(leaves), default=rules is None))
    unused = [r.pattern for i, r in enumerate(ready) if r.required and i not in used]
    if unused and decided and not is_part(params):
        raise ValueError(
            f"the role rule {unused[0]!r} decides no parameter: no path matches it, or an earlier "
            "rule takes them all; correct or remove it, or make it Rule(..., required=False)."
        )
    return decided


def _axes(rule: Rule, ndim: int) -> MatrixAxes | None:
    """The axes of a parameter with so many, those of stacked layers not counted."""
    if rule.axes is not None:
        return rule.axes
    if rule.role == "convolution":
        return window(ndim) if ndim > 2 else None
    # Of a vector the layout says what is wrong.
    return IN_OUT if ndim <= 2 else None


def _module(path: str) -> tuple[str, str]:
    """The module two levels above, and the path from there."""
    parts = path.split("/")
    return "/".join(parts[:-2]), "/".join(parts[-2:])


def _modules(leaves: Sequence[tuple[str, Any]]) -> Mapping[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in leaves:
        module, rest = _module(name)
        found.setdefault(module, {})[rest] = shape
    return found


def _layer_axes(
    leaves: Sequence[tuple[str, tuple[int, ...]]], rules: Sequence[Rule]
) -> dict[str, int]:
    """How many leading axes of a parameter stack layers, by path, where there are any.

    A norm has one axis. If one has more, and all parameters of the module it is in begin with the same,
    these stack layers (``nnx.vmap``, ``nn.scan``); and so for the modules around it.
    """
    by_name = [rule for rule in rules if rule.ndim is None and rule.where is None]
    found: dict[str, int] = {}
    for name, shape in leaves:
        if len(shape) < 2 or name in found:
            continue
        first = next((rule.role for rule in by_name if re.search(rule.pattern, name)), None)
        if first != "norm":
            continue
        lead = shape[:-1]
        for end in range(name.count("/"), -1, -1):
            prefix = "".join(f"{part}/" for part in name.split("/")[:end])
            inside = {path: other for path, other in leaves if path.startswith(prefix)}
            if any(other[: len(lead)] != lead for other in inside.values()):
                break
            found |= dict.fromkeys(inside, len(lead))
    return found


def assign_roles(params: Any, rules: Rules | None = None) -> Any:
    """The role of every parameter, as a tree shaped like `params`.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: ordered `Rule`, or plain tuples of its first fields; the first that matches decides. By
        default ``ravine.COMMON_RULES``.

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
    """As `assign_roles`, with the role ``other`` where no rule matches.

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
      ValueError: for a misspelt role; and where the mask is made, as `assign_roles`.

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
    """Rows and columns of the parameter at a path, by the rule that decides it.

    Rules that look at what stands beside a parameter do not count here.

    Args:
      path: as of `path_string`.
      rules: as for `assign_roles`.
      ndim: how many axes the parameter has, those of stacked layers not counted; None passes over
        rules that ask, and takes `[..., in, out]` where a rule says nothing.

    Raises:
      ValueError: if no rule matches, or what the axes mean is not known.

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
            found = _axes(rule, 2 if ndim is None else ndim)
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

    JAX takes None for an empty tree, so map over the result with
    ``is_leaf=lambda leaf: leaf is None``.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      roles: the roles that hold matrices.

    Returns:
      A tree shaped like `params`, of `Layout` and None.

    Raises:
      ValueError: as `assign_roles`; for parameters of which it is not known what their axes mean; and
        if a parameter's shape does not have the axes of its rule, as a vector that is called a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import layouts
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> found = layouts({"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}, rules)
      >>> found["kernel"].pieces, found["scale"]
      (((3, 2, 5),), None)
    """
    check_roles("roles", roles)
    found = [d.layout() if d.role in roles else None for d in decide(params, rules, roles)]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def axes_from_names(
    names: Sequence[str | None],
    rows: Collection[str],
    columns: Collection[str],
    batch: Collection[str] = ("layers", "experts"),
) -> MatrixAxes:
    """Axes by logical names: Linen's ``box.names``, NNX's ``get_metadata()["out_sharding"]``.

    Args:
      names: one for each axis of the leaf.
      rows: names that are inputs of this leaf; another leaf may have them as outputs.
      columns: names that are outputs of this leaf.
      batch: names of axes along which matrices are stacked.

    Raises:
      ValueError: for a name in none or several of the three, or at two axes; if rows or columns
        have no axis.

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
                f"the axis name {name!r} of {names} must stand there once and be in one of rows, "
                f"columns and batch, but is in {' and '.join(homes) or 'none'}; add or remove it, "
                "or write MatrixAxes by number."
            )
    chosen = [tuple(a for a, name in enumerate(names) if name in side) for side in (rows, columns)]
    if not all(chosen):
        raise ValueError(f"no axis of {names} is in rows, or none in columns; name one in each.")
    return MatrixAxes(*chosen)


@checked
def role_table(params: Any, rules: Rules | None = None, tx: Any = None) -> str:
    """A table to print: what each parameter is taken for, and what an optimizer does to it.

    :func:`ravine.explain` tells more of an optimizer.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      tx: an optimizer, for the columns ``optimizer`` and ``decay``, read off the optimizer itself.

    Raises:
      ValueError: as `assign_roles`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> params = {"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}
      >>> tx = ravine.muon(0.02, weight_decay=0.1)
      >>> print(ravine.role_table(params, tx=tx))
      path    shape      role    matrices                      optimizer  decay
      kernel  (3, 2, 5)  matrix  [batch 3, rows 2, columns 5]  muon       0.1
      scale   (3, 2)     norm    -                             adam       0.1
    """
    table = [("path", "shape", "role", "matrices", "optimizer", "decay")]
    found = {} if tx is None else probe(tx, params)[0]
    for d in decide(params, rules):
        optimizer, decay = "-", "-"
        if d.path in found:
            optimizer = found[d.path].optimizer
            decay = found[d.path].says.get("decay", "no")
        seen_as = matrices(d) if d.role in MATRIX_ROLES else "-"
        table.append((d.path, str(d.shape), str(d.role), seen_as, optimizer, decay))
    return text_table(table)


def matrices(d: Decided) -> str:
    """The matrices in a parameter, in words.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import decide, matrices
      >>> matrices(decide({"kernel": jnp.ones((2, 5))})[0])
      '[batch 1, rows 2, columns 5]'
    """
    if d.axes is None:
        return "? (say which axes are rows and columns)"
    pieces = d.layout().pieces
    return " + ".join(f"[batch {b}, rows {m}, columns {n}]" for b, m, n in pieces)
