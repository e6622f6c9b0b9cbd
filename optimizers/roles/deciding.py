"""Which rule decides a parameter, and what the parameter is: the first rule that matches its path."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from ...core.checks import near, shown
from ...core.paths import path_string, paths_of
from ...core.tree_checks import check_real_leaves, is_part
from ..matrix.shape.layout import Layout, MatrixAxes, layout
from .refusal import refusal
from .rules import COMMON_RULES, IN_OUT, Role, Rule, Rules, window


class Decided(NamedTuple):
    """What the rules say about one parameter."""

    path: str
    shape: tuple[int, ...]
    role: Role | None
    """None if no rule matches."""
    axes: MatrixAxes | None
    """Rows and columns; None if the meaning of the axes is unknown."""

    def layout(self) -> Layout:
        """The layout as matrices."""
        assert self.axes is not None
        return layout(self.shape, self.axes, self.path)


def check_roles(name: str, roles: Iterable[str]) -> None:
    """Raises for an unknown role in the argument called `name`.

    Example:
      >>> from ravine.optimizers.roles import check_roles
      >>> check_roles("roles", ["matrix"])
    """
    known = get_args(Role)
    for role in (roles,) if isinstance(roles, str) else roles:
        if role not in known:
            raise ValueError(f"{name} has {role!r}, which is no role; {near(str(role), known)}")
    if isinstance(roles, str):
        raise ValueError(f"{name} must be a sequence of roles, not a string; write [{roles!r}].")


def complete(rules: Rules | None) -> tuple[Rule, ...]:
    """Rules as `Rule`; the default rules for None.

    Raises:
      ValueError: for an unknown role, a pattern that is not a regular expression, axes that are not
        `MatrixAxes`, and tuples of another form.

    Example:
      >>> from ravine.optimizers.roles import complete
      >>> complete([("scale$", "norm")])[0].role
      'norm'
    """
    found = tuple(map(_as_rule, COMMON_RULES if rules is None else tuple(rules)))
    for rule in found:
        check_roles(f"the role rule for {rule.pattern!r}", [rule.role])
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(
                f"the role rule {rule.pattern!r} is not a regular expression: {error}; correct it."
            ) from error
    return found


def _as_rule(given: Any) -> Rule:
    try:
        rule = Rule(*given)
    except TypeError:
        raise ValueError(
            f"the role rule {shown(given)} is not a tuple (pattern, role) or (pattern, role, "
            "ravine.MatrixAxes(rows, columns)); correct it."
        ) from None
    for what, value, is_kind, right in (
        (
            "pattern",
            rule.pattern,
            isinstance(rule.pattern, (str, re.Pattern)),
            "a regular expression",
        ),
        ("axes", rule.axes, isinstance(rule.axes, MatrixAxes | None), "ravine.MatrixAxes(...)"),
        ("required", rule.required, isinstance(rule.required, bool), "True or False"),
        ("ndim", rule.ndim, isinstance(rule.ndim, int | None), "a whole number"),
        ("where", rule.where, rule.where is None or callable(rule.where), "a function"),
    ):
        if not is_kind:
            raise ValueError(
                f"the role rule for {rule.pattern!r} has {what}={shown(value)}; give {right}."
            )
    return rule


def decide(
    params: Any,
    rules: Rules | None = None,
    needed: Collection[Role] = (),
    *,
    lenient: bool = False,
    vectors: bool = True,
) -> list[Decided]:
    """The role of every parameter, in the order of the leaves.

    Args:
      params: a tree of arrays, or of their shapes.
      rules: as for `assign_roles`.
      needed: roles whose rows and columns must be known.
      lenient: parameters that no rule matches get the role ``other``.
      vectors: whether parameters with needed roles may have fewer than two axes.

    Raises:
      ValueError: for two parameters with one path; unless `lenient`, for all parameters that no rule
        matches or that have needed but unknown axes, together; or a required rule that decides no
        parameter.
      TypeError: if one of these parameters is not a real floating-point array, so that no rule helps.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.optimizers.roles import decide
      >>> decide({"up": {"kernel": jnp.ones((2, 3))}})[0].axes
      MatrixAxes(rows=(-2,), columns=(-1,), row_parts=1, column_parts=1)
    """
    ready = complete(rules)
    shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
    leaves = list(zip(paths_of(params), shapes, strict=True))
    layers, modules = _layer_axes(leaves, ready), _modules(leaves)
    used, decided = set(), []
    for name, shape in leaves:
        ndim = len(shape) - layers.get(name, 0)
        beside = modules[_module(name)]
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
        decided.append(Decided(name, shape, rule.role, axes_of_rule(rule, ndim)))
    if lenient:
        return decided
    is_matrix = lambda d: d.axes is not None and (vectors or len(d.shape) > 1)
    unclear = [d for d in decided if d.role is None or (d.role in needed and not is_matrix(d))]
    if unclear:
        paths = {d.path for d in unclear}
        check_real_leaves(
            jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if path_string(path) in paths else None, params
            )
        )
        raise ValueError(refusal(unclear, dict(leaves), default=rules is None))
    unused = [r.pattern for i, r in enumerate(ready) if r.required and i not in used]
    if unused and decided and not is_part(params):
        raise ValueError(
            f"the role rule {unused[0]!r} decides no parameter: no path matches it, or an earlier "
            "rule takes them all; correct or remove it, or make it Rule(..., required=False)."
        )
    return decided


def axes_of_rule(rule: Rule, ndim: int) -> MatrixAxes | None:
    """The axes of a parameter with this many axes, without those of stacked layers."""
    if rule.axes is not None:
        return rule.axes
    if rule.role == "convolution":
        return window(ndim) if ndim > 2 else None
    # For a vector, the layout raises the error.
    return IN_OUT if ndim <= 2 else None


def _module(path: str) -> str:
    """The module two levels above."""
    return "/".join(path.split("/")[:-2])


def _modules(leaves: Sequence[tuple[str, Any]]) -> Mapping[str, dict[str, tuple[int, ...]]]:
    """Modules two levels above a parameter, each with the shapes of all that is below it."""
    found: dict[str, dict[str, tuple[int, ...]]] = {_module(name): {} for name, _ in leaves}
    for name, shape in leaves:
        parts = name.split("/")
        for end in range(len(parts)):
            module = "/".join(parts[:end])
            if module in found:
                found[module]["/".join(parts[end:])] = shape
    return found


def _layer_axes(
    leaves: Sequence[tuple[str, tuple[int, ...]]], rules: Sequence[Rule]
) -> dict[str, int]:
    """How many leading axes of a parameter stack layers, by path, if there are any.

    A norm has one axis. If it has more, and all parameters of its module begin with the same axes,
    these stack layers (``nnx.vmap``, ``nn.scan``); the same holds for the enclosing modules.
    """
    by_name = [rule for rule in rules if rule.ndim is None and rule.where is None]
    found: dict[str, int] = {}
    for name, shape in leaves:
        # A gain for one element, as Equinox's WeightNorm has for each output, stacks nothing.
        if len(shape) < 2 or shape[-1] == 1 or name in found:
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
