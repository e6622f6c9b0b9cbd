r"""Weights of fixed norm, instead of weight decay (hyperball).

.. math:: W \leftarrow R \, \frac{W - \eta R\, \hat u}{\lVert W - \eta R\, \hat u \rVert_F}, \qquad
    \hat u = u / \lVert u \rVert_F, \quad R = \lVert W_0 \rVert_F

There are two pieces around the learning rate: `scale_by_parameter_norm` makes the direction
:math:`R \hat u`, and `keep_parameter_norm` turns the finished update into one that ends on the sphere.
The learning rate is then an angle, about the square root of learning rate times weight decay in a run
with decay.
"""

from typing import Any, NamedTuple

import jax
import optax

from ...core.arguments import checked
from ...core.arithmetic import wide
from ...core.leaves import at_leaves, from_leaves
from ...core.transformation import transformation
from ...core.tree_checks import check_params_given
from ..matrix.shape.matrices import (
    DEFAULT_AXES,
    Axes,
    frobenius,
    joined,
    layouts_of,
    map_pieces,
    no_state,
    safe_divide,
    split,
)


def _unit(x_LxMxN: jax.Array) -> jax.Array:
    return safe_divide(wide(x_LxMxN), frobenius(x_LxMxN))


@checked
def scale_by_parameter_norm(*, axes: Axes = DEFAULT_AXES) -> optax.GradientTransformation:
    """Gives the update of every matrix the Frobenius norm of the matrix itself.

    Args:
      axes: which axes of a leaf are rows and columns.

    Raises:
      ValueError: for a leaf that is not a matrix, or without parameters at the update.

    Source: https://arxiv.org/abs/2606.16899.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.scale_by_parameter_norm(), jnp.array([[3.0, 4.0]])
      >>> tx.update(jnp.array([[0.0, 0.1]]), tx.init(params), params)[0]
      Array([[0., 5.]], dtype=float32)
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        check_params_given(params, "scale_by_parameter_norm")

        def scaled(u: jax.Array, p: jax.Array) -> jax.Array:
            return (_unit(u) * frobenius(p).astype(wide(u).dtype)).astype(u.dtype)

        return map_pieces(scaled, layouts_of(updates, axes), updates, params), state

    return transformation(no_state(axes), update)


class KeepParameterNormState(NamedTuple):
    """State of `keep_parameter_norm`."""

    radius: Any  # like params, a tuple of [L, 1, 1] per leaf: the norms at init


@checked
def keep_parameter_norm(*, axes: Axes = DEFAULT_AXES) -> optax.GradientTransformation:
    """Last in a chain: corrects every update so that each matrix keeps the norm it had at `init`.

    A matrix that is zero at `init` stays zero: initialise such parameters differently, or leave them
    out.

    Args:
      axes: which axes of a leaf are rows and columns.

    Raises:
      ValueError: for a leaf that is not a matrix, or without parameters at the update.

    Source: https://arxiv.org/abs/2606.16899.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.keep_parameter_norm(), jnp.array([[1.0, 0.0]])
      >>> params + tx.update(jnp.array([[-1.0, 0.5]]), tx.init(params), params)[0]
      Array([[0., 1.]], dtype=float32)
    """

    def init(params: optax.Params) -> KeepParameterNormState:
        leaves = split(params, layouts_of(params, axes))
        radius = [tuple(frobenius(piece) for piece in leaf) for leaf in leaves]
        return KeepParameterNormState(at_leaves(params, radius))

    def update(
        updates: optax.Updates, state: KeepParameterNormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, KeepParameterNormState]:
        check_params_given(params, "keep_parameter_norm")
        layouts = layouts_of(updates, axes)
        radii = from_leaves(updates, state.radius)

        def bent(u: jax.Array, p: jax.Array, radius: jax.Array) -> jax.Array:
            dtype = radius.dtype
            target = _unit(u.astype(dtype) + p.astype(dtype)) * radius
            return (target - p.astype(dtype)).astype(u.dtype)

        pieces = [
            [bent(*arguments) for arguments in zip(*leaf, strict=True)]
            for leaf in zip(split(updates, layouts), split(params, layouts), radii, strict=True)
        ]
        return joined(pieces, updates, layouts), state

    return transformation(init, update)
