"""The error for parameters that the rules do not decide: it lists all, with rules to correct."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..matrix.shape.layout import MatrixAxes


def refusal(unclear: Sequence[Any], shapes: Mapping[str, tuple[int, ...]], *, default: bool) -> str:
    """A message with every parameter in question and a ``rules=`` to paste and correct.

    Args:
      unclear: the `Decided` without a role, or without axes.
      shapes: the shapes of all parameters, by path.
      default: whether the rules are the default.
    """
    width = max(len(d.path) for d in unclear)
    across = max(len(str(d.shape)) for d in unclear)
    lines = [
        f"  {d.path or '(the root)':<{width}}  {d.shape!s:<{across}}  {_problem(d)}"
        for d in unclear
    ]
    rules: dict[str, str] = {}
    for d in unclear:
        # A pattern for all layers of a list.
        pattern = "/".join(
            r"\d+" if part.isdigit() else re.escape(part) for part in d.path.split("/")
        )
        role, axes, comment = _suggestion(d, shapes)
        rules[f"    (r{f'^{pattern}$'!r}, {role!r}{axes}),".replace("\\\\", "\\")] = comment
    last = "    *ravine.COMMON_RULES," if default else "    *rules,  # those you gave"
    return "\n".join(
        [
            f"{len(unclear)} of {len(shapes)} parameters match no role rule, or it is not known what "
            "their axes mean:",
            *lines,
            "Say what they are; paste this and correct it:",
            "rules=[",
            *(f"{rule}  # {comment}" if comment else rule for rule, comment in rules.items()),
            last,
            "]",
        ]
    )


def _problem(d: Any) -> str:
    if d.role is None and not d.path and len(d.shape) == 1:
        return "no role rule matches, as it has no name; optax.flatten loses names and shapes"
    if d.role is None:
        return "no role rule matches"
    if len(d.shape) < 2:
        return f"a {d.role}, but it has fewer than two axes"
    return f"a {d.role}: which axes are its rows (in), which its columns (out)?"


def _suggestion(d: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, str]:
    """Role, axes as text, and a comment on what to check."""
    ndim, name = len(d.shape), d.path.lower()
    module, _, own = d.path.rpartition("/")
    if ndim < 2:
        return ("norm" if _is_gain(d.path) else "bias" if ndim else "other"), "", ""
    role = d.role or ("embedding" if "emb" in name else "matrix")
    if ndim == 2:
        role = "norm" if d.role is None and _is_gain(own) else role
        return role, "", "matrix, embedding, head, norm (of stacked layers) or other?"
    # The axes of a bias are those of the outputs, or of stacked layers and the output.
    bias = shapes.get(re.sub(r"[^/]+$", "bias", d.path), ())
    outputs = len(bias) if 0 < len(bias) < ndim and d.shape[-len(bias) :] == bias else 1
    stacked = outputs == 1 and len(bias) == ndim - 1 and bias == (*d.shape[:-2], d.shape[-1])
    # A gain has one axis, and one more if its layers are stacked.
    stacked |= outputs == 1 and any(
        len(shape) == 2 and shape[0] == d.shape[0] and _is_gain(path.removeprefix(module))
        for path, shape in shapes.items()
        if path.rpartition("/")[0] == module
    )
    axes = MatrixAxes(tuple(range(-2 if stacked else -ndim, -outputs)), tuple(range(-outputs, 0)))
    if own == "weight":  # [out, in, *window], as those with two axes are, with a bias [out, 1, ...]
        first = ndim - (stacked or (len(bias) == ndim - 1 and bias[:2] == d.shape[:2]))
        axes = MatrixAxes(tuple(range(1 - first, 0)), (-first,))
    return role, f", ravine.MatrixAxes({axes.rows}, {axes.columns})", f"{d.shape}: in, out?"


def _is_gain(path: str) -> bool:
    return re.search(r"norm|scale|gain|gamma", path.lower()) is not None
