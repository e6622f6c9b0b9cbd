"""Roles: which parameter is what, decided by its path, never by its number of axes.

Under scanned layers a norm's scale is 2-D and a matrix 3-D, and an embedding is as 2-D as any
matrix; so ordered rules over the path say what a parameter is, and which of its axes are rows and
columns. The first rule that matches decides, and every parameter must be matched.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np

from ..core.tree_checks import is_part
from .matrix.layout import DEFAULT, Layout, MatrixAxes, layout

Role = Literal["embedding", "head", "matrix", "norm", "bias", "router", "convolution"]


MATRIX_ROLES: tuple[Role, ...] = ("matrix", "convolution")


class Rule(NamedTuple):
    """What the parameters are whose path a regular expression finds.

    Example:
      >>> from ravine.optimizers.roles import NNX_RULES, Rule
      >>> rules = [Rule("classifier/kernel$", "head"), *NNX_RULES]  # the first match decides
    """

    pattern: str
    """A regular expression, searched in the path (`re.search`)."""
    role: Role
    axes: MatrixAxes | None = None
    """Rows and columns; None for `[..., in, out]`, and `CONVOLUTION` for convolutions."""
    required: bool = True
    """Refuse parameters of which it decides none: it is misspelt, or an earlier rule takes them."""


Rules = Sequence[Rule | tuple[str, Role] | tuple[str, Role, MatrixAxes | None]]

CONVOLUTION = MatrixAxes((-4, -3, -2), (-1,))
"""`[..., height, width, in, out]`, layers scanned or not. A convolution over time, `[..., time, in,
out]`, needs a rule with `MatrixAxes((-3, -2), (-1,))`; one over volumes, `((-5, -4, -3, -2), (-1,))`.
Depthwise convolutions are no matrices: give them another role."""
ATTENTION_IN = MatrixAxes((-3,), (-2, -1))
"""`[..., in, heads, head width]`: Flax's query, key and value. ``column_parts=heads``, on a copy by
`dataclasses.replace`, makes each head its own matrix."""
ATTENTION_OUT = MatrixAxes((-3, -2), (-1,))
"""`[..., heads, head width, out]`: Flax's output projection."""

RAVINE_RULES: Rules = (
    Rule(r"(^|/)embed/embedding$", "embedding"),
    Rule(r"(^|/)head/kernel$", "head"),
    Rule(r"norm/scale$", "norm"),
    Rule(r"/kernel$", "matrix"),
)
"""Rules for the model of ``ravine.training``."""

_SHARED = (
    Rule(r"embedding$", "embedding", required=False),
    Rule(r"(^|/)(lm_head|head|logits|logits_dense)/kernel$", "head", required=False),
    Rule(r"(^|[/_])router/kernel$", "router", required=False),
    Rule(r"(^|[/_])scale$", "norm", required=False),
    Rule(r"(^|[/_])bias$", "bias", required=False),
)
_CONVOLUTION = Rule(r"(^|/)[^/]*[Cc]onv(?!Local)[^/]*/kernel$", "convolution", required=False)

LINEN_RULES: Rules = (
    *_SHARED,
    Rule(r"Attention_\d+/(query|key|value)/kernel$", "matrix", ATTENTION_IN, required=False),
    Rule(r"Attention_\d+/out/kernel$", "matrix", ATTENTION_OUT, required=False),
    _CONVOLUTION,
    # All kernels but those whose axes depend on a module that the path does not tell.
    Rule(
        r"^(?!(.*/)?(query|key|value|out|(ConvLocal|DenseGeneral|Einsum)_\d+)/kernel$).*kernel$",
        "matrix",
        required=False,
    ),
)
"""Rules for Flax Linen, with the names it gives to modules (``Dense_0``, ``Conv_0``).

An output head is known by one of the names lm_head, head, logits, logits_dense; one called
``Dense_7`` needs a rule in front, or it is a matrix. ``query``, ``key``, ``value`` and ``out`` match
only in an attention that Linen named, and kernels of ``DenseGeneral`` never: the path does not tell
their axes."""

NNX_RULES: Rules = (
    *_SHARED,
    Rule(r"(^|/)(query|key|value)/kernel$", "matrix", ATTENTION_IN, required=False),
    Rule(r"(^|/)out/kernel$", "matrix", ATTENTION_OUT, required=False),
    _CONVOLUTION,
    Rule(r"kernel$|lora_[ab]$", "matrix", required=False),
)
"""Rules for Flax NNX, where modules have the names of your attributes.

``query``, ``key``, ``value`` and ``out`` are taken for those of ``nnx.MultiHeadAttention``, an
attribute with ``conv`` in its name for a convolution, any other kernel for `[..., in, out]`. Where
they are something else, as scanned ``nnx.Linear`` called ``query``, put rules in front."""

COMMON_RULES: Rules = (
    Rule(r"(^|/)layers/attention/(query|key|value)/kernel$", "matrix", required=False),
    Rule(r"(^|/)lora_[ab]$", "matrix", required=False),
    *LINEN_RULES,
)
"""Rules for models of ``ravine.training``, Linen and NNX alike, but for what names cannot tell.

``query``, ``key`` and ``value`` are `[..., in, out]` in ``layers/attention``, as Ravine's model has
them, and Flax's in an attention that Linen named; elsewhere they and ``out`` match no rule, and
`NNX_RULES` or rules of your own decide."""

MAXTEXT_RULES: Rules = (
    *_SHARED,
    Rule(r"(^|/)sinks$", "bias", required=False),
    Rule(r"(^|[/_])gate/kernel$", "router", required=False),
    Rule(
        r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$",
        "matrix",
        MatrixAxes((0,), (-2, -1)),
        required=False,
    ),
    Rule(r"(^|/)out/kernel$", "matrix", MatrixAxes((0, -2), (-1,)), required=False),
    Rule(
        r"(^|/)(wi|wi_0|wi_1|wo|wq_a|wkv_a)/kernel$",
        "matrix",
        MatrixAxes((0,), (-1,)),
        required=False,
    ),
    Rule(r"MoeBlock_\d+/(wi_0|wi_1|wo)$", "matrix", required=False),
)
"""Rules for text decoders of MaxText, dense, MLA and mixture of experts (August 2026).

Its scanned layers are at axis 1 (``param_scan_axis``): `[in, layers, heads, head width]`, `[heads,
layers, head width, out]`, `[in, layers, out]`, experts `[experts, layers, in, out]`. Unscanned ones
are right too. ``qkv_proj`` (``fused_qkv``) needs the numbers of heads, so a rule of yours."""


def path_string(path: Iterable[Any]) -> str:
    """A key path as ``layers/attention/query/kernel``; Flax's trailing ``.value`` is left out.

    Example:
      >>> import jax
      >>> from ravine.optimizers.roles import path_string
      >>> [path_string(path) for path, _ in jax.tree.leaves_with_path({"a": {"b": [1, 2]}})]
      ['a/b/0', 'a/b/1']
    """
    keys = tuple(path)
    # An attribute of a variable or a box; an entry `["value"]` of a dictionary is a name.
    if len(keys) > 1 and getattr(keys[-1], "name", None) in ("value", "raw_value"):
        keys = keys[:-1]
    parts = (getattr(k, "name", getattr(k, "key", getattr(k, "idx", k))) for k in keys)
    return "/".join(map(str, parts))


def assign_roles(params: Any, rules: Rules = RAVINE_RULES) -> Any:
    """The role of every parameter, as a tree shaped like `params`.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: ordered `Rule`, or plain tuples of its first fields; the first that matches decides.

    Raises:
      ValueError: if a parameter matches no rule, or a required rule decides no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import assign_roles
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> assign_roles({"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}, rules)
      {'kernel': 'matrix', 'scale': 'norm'}
    """
    roles = [rule.role for _, _, rule in _decided(params, rules)]
    return jax.tree.unflatten(jax.tree.structure(params), roles)


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


def axes_of_path(path: str, rules: Rules = RAVINE_RULES) -> MatrixAxes:
    """Rows and columns of the parameter at a path, by the rule that decides it.

    Args:
      path: as of `path_string`.
      rules: as for `assign_roles`.

    Raises:
      ValueError: if no rule matches.

    Example:
      >>> from ravine.optimizers.roles import LINEN_RULES, axes_of_path
      >>> axes_of_path("Conv_0/kernel", LINEN_RULES).rows
      (-4, -3, -2)
    """
    return _axes(_decide(path, _complete(rules))[1])


def layouts(
    params: Any,
    rules: Rules = RAVINE_RULES,
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
      ValueError: as `assign_roles`, and if a parameter's shape does not have the axes of its rule, as
        a vector that is called a matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import layouts
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> found = layouts({"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}, rules)
      >>> found["kernel"].pieces, found["scale"]
      (((3, 2, 5),), None)
    """
    found = [_layout(*decided, roles) for decided in _decided(params, rules)]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def role_table(
    params: Any,
    rules: Rules = RAVINE_RULES,
    optimizers: Mapping[Role, str] | None = None,
    decay: Collection[Role] = (),
) -> str:
    """A table to print: what each parameter is taken for, and what is done to it.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      optimizers: the name of each role's optimizer.
      decay: the roles that decay.

    Raises:
      ValueError: as `layouts`, and if `optimizers` lacks a role.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import role_table
      >>> params = {"kernel": jnp.ones((3, 2, 5)), "scale": jnp.ones((3, 2))}
      >>> rules = [("scale$", "norm"), ("kernel$", "matrix")]
      >>> print(role_table(params, rules, {"matrix": "muon", "norm": "adamw"}, ["matrix"]))
      path    shape      role    matrices                      optimizer  decay
      kernel  (3, 2, 5)  matrix  [batch 3, rows 2, columns 5]  muon       yes
      scale   (3, 2)     norm    -                             adamw      no
    """
    table = [("path", "shape", "role", "matrices", "optimizer", "decay")]
    for name, leaf, rule in _decided(params, rules):
        if optimizers is not None and rule.role not in optimizers:
            raise ValueError(
                f"optimizers has none for the role {rule.role!r} of {name!r}; add one."
            )
        found = _layout(name, leaf, rule, MATRIX_ROLES)
        pieces = found.pieces if found else ()
        matrices = " + ".join(f"[batch {b}, rows {m}, columns {n}]" for b, m, n in pieces)
        optimizer = optimizers[rule.role] if optimizers is not None else "-"
        decays = "yes" if rule.role in decay else "no"
        table.append((name, str(np.shape(leaf)), rule.role, matrices or "-", optimizer, decays))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    return "\n".join(lines)


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


def _complete(rules: Rules) -> list[Rule]:
    return [Rule(*cast(Any, rule)) for rule in rules]


def _decide(path: str, rules: Sequence[Rule]) -> tuple[int, Rule]:
    for index, rule in enumerate(rules):
        if re.search(rule.pattern, path):
            return index, rule
    raise ValueError(f"no role rule matches the parameter {path!r}; add one for it.")


def _decided(params: Any, rules: Rules) -> list[tuple[str, Any, Rule]]:
    """Path, leaf and rule of every parameter, in the order of the leaves."""
    complete, used, decided = _complete(rules), set(), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_string(path)
        index, rule = _decide(name, complete)
        used.add(index)
        decided.append((name, leaf, rule))
    unused = [r.pattern for i, r in enumerate(complete) if r.required and i not in used]
    if unused and decided and not is_part(params):
        raise ValueError(
            f"the role rule {unused[0]!r} decides no parameter: no path matches it, or an earlier "
            "rule takes them all; correct or remove it, or make it Rule(..., required=False)."
        )
    return decided


def _axes(rule: Rule) -> MatrixAxes:
    return rule.axes or (CONVOLUTION if rule.role == "convolution" else DEFAULT)


def _layout(name: str, leaf: Any, rule: Rule, roles: Collection[str]) -> Layout | None:
    return layout(np.shape(leaf), _axes(rule), name) if rule.role in roles else None
