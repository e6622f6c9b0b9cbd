"""The error for a state that another optimizer made, or the same with other options.

It is looked for only after an update failed, so it costs nothing in a run.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .containers import first_other
from .paths import key_names


class StateMismatchError(ValueError):
    """The state is not one that `init` makes for these parameters."""


def check_state(
    state: Any, init: Callable[[Any], Any], params: Any, *, dtypes: bool = True
) -> None:
    """Raises if a state has other leaves, containers, shapes or dtypes than `init` would give it.

    Args:
      state: the state.
      init: makes one.
      params: the parameters, or arrays of their shapes.
      dtypes: whether dtypes are compared too.

    Raises:
      StateMismatchError: names the first difference, and what to do.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.core.state_fit import check_state
      >>> tx, params = ravine.scale_by_lion(), {"w": jnp.ones((2, 3))}
      >>> check_state(tx.init(params), tx.init, params)
    """
    try:
        made = jax.eval_shape(lambda tree: init(tree), params)
    except Exception:  # Then the parameters are the problem, which the failed update names.
        return
    found, expected = _shapes(state), _shapes(made)
    if found == expected:
        _check_containers(state, made)
        if dtypes:
            _check_dtypes(state, made)
        return
    path = next(p for p in (*expected, *found) if found.get(p) != expected.get(p))
    name = repr("/".join(path))
    if path not in found:
        what = f"it has no {name}"
    elif path not in expected:
        what = f"it has {name}, which this optimizer does not keep"
    else:
        what = f"its {name} has shape {found[path]}, not {expected[path]}"
    raise StateMismatchError(
        f"the state was not made by this optimizer with these options and parameters: {what}; build "
        "the optimizer as it was when the state was made, or start again with tx.init(params)."
    )


def _check_containers(state: Any, made: Any) -> None:
    other = first_other(state, made)
    if other is None or other[1] not in ("dict", "list"):
        return
    path, kind, expected = other
    where = f"its {'/'.join(path)!r}" if path else "it"
    raise StateMismatchError(
        f"the state has the right arrays, but {where} is a {kind} in place of a {expected}, as in a "
        "checkpoint restored without a target; give the target jax.eval_shape(tx.init, params)."
    )


def _check_dtypes(state: Any, made: Any) -> None:
    found = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), like in zip(found, jax.tree.leaves(made), strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype != like.dtype and np.ndim(leaf):
            raise StateMismatchError(
                f"the state's {'/'.join(key_names(path))!r} has dtype {dtype}, not {like.dtype} as made "
                "by this optimizer; cast it, or give the optimizer's own options for dtypes."
            )


def _shapes(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {key_names(path): tuple(np.shape(leaf)) for path, leaf in leaves}
