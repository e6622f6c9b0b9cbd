"""Weights kept on unit spheres, as in nGPT: every vector along the model's width has norm one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.paths import path_string
from ..core.transformation import transformation
from ..core.tree_checks import check_params_given

Axis = int | Callable[[str], int | None]


def _axis_of(axis: Axis, path: Any, leaf: jax.Array) -> int | None:
    name = path_string(path)
    found = axis(name) if callable(axis) else axis
    if found is not None and not -leaf.ndim <= found < leaf.ndim:
        raise ValueError(
            f"{name} has shape {leaf.shape} and no axis {found}; give a function of the path that "
            "returns None for parameters to leave alone."
        )
    return found


def _normalized(x: jax.Array, axis: int) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


@checked
def unit_norm(params: optax.Params, axis: Axis = -1) -> optax.Params:
    """The parameters scaled to norm one along an axis, to start :func:`keep_unit_norm` from.

    Args:
      params: a tree.
      axis: see :func:`keep_unit_norm`.

    Raises:
      ValueError: for a parameter without such an axis.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> ravine.stability.unit_norm(jnp.array([[3.0, 4.0]]))
      Array([[0.6, 0.8]], dtype=float32)
    """

    def normalized(path: Any, p: jax.Array) -> jax.Array:
        along = _axis_of(axis, path, p)
        return p if along is None else _normalized(wide(p), along).astype(p.dtype)

    return jax.tree_util.tree_map_with_path(normalized, params)


@checked
def keep_unit_norm(axis: Axis = -1) -> optax.GradientTransformation:
    r"""Last in a chain: bends every update so that the weights end with norm one along an axis.

    .. math:: w \leftarrow (w + u) / \lVert w + u \rVert

    In nGPT the axis is that of the model's width: the last of embeddings `[vocabulary, width]` and of
    projections back into the stream `[in, width]`, the first of those out of it `[width, out]`. It takes
    neither weight decay nor warm-up. Vectors of zeros stay zero. Weights of fixed Frobenius norm are
    kept by ``ravine.keep_parameter_norm`` (hyperball).

    Args:
      axis: of all parameters, or a function from a path to it, with None for those to leave alone.

    Raises:
      ValueError: for a parameter without such an axis, or without parameters at the update.

    Source: Loshchilov et al., 2024, https://arxiv.org/abs/2410.01131; NVIDIA/ngpt, ``train.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.stability.keep_unit_norm(), jnp.array([[1.0, 0.0]])
      >>> params + tx.update(jnp.array([[-1.0, 0.5]]), tx.init(params), params)[0]
      Array([[0., 1.]], dtype=float32)
    """

    def init(params: optax.Params) -> optax.EmptyState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _axis_of(axis, path, leaf)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        check_params_given(params, "keep_unit_norm")

        def bent(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            along = _axis_of(axis, path, p)
            if along is None:
                return u
            x = wide(p)
            return (_normalized(x + u.astype(x.dtype), along) - x).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(bent, updates, params), state

    return transformation(init, update)
