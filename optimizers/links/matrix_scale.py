"""How large the update of a matrix should be, given its shape."""

import math
from typing import Literal, get_args

import jax
import optax

from ...core.arguments import checked
from ...core.arithmetic import cast, wide
from ...core.transformation import transformation
from ..matrix.shape.layout import Layout
from ..matrix.shape.matrices import DEFAULT_AXES, Axes, layouts_of, map_pieces, no_state

Scale = Literal["keller", "moonlight", "spectral", "none"]


def shape_factor(rule: Scale, fan_in: int, fan_out: int) -> float:
    r"""The factor that multiplies an orthogonal `[fan_in, fan_out]` matrix.

    ==============  =========================================  =====================================
    rule            factor                                     what it keeps
    ==============  =========================================  =====================================
    ``keller``      :math:`\sqrt{\max(1, out / in)}`           Keller Jordan's ``muon.py``
    ``moonlight``   :math:`0.2 \sqrt{\max(in, out)}`           root mean square near Adam's, 0.2
    ``spectral``    :math:`\sqrt{out / in}`                    the change of activations' RMS
    ``none``        1
    ==============  =========================================  =====================================

    Example:
      >>> from ravine.optimizers.links.matrix_scale import shape_factor
      >>> [shape_factor(rule, 4, 16) for rule in ("keller", "moonlight", "spectral")]
      [2.0, 0.8, 2.0]
    """
    if rule == "keller":
        return math.sqrt(max(1.0, fan_out / max(1, fan_in)))
    if rule == "moonlight":
        return 0.2 * math.sqrt(max(fan_in, fan_out))
    if rule == "spectral":
        return math.sqrt(fan_out / max(1, fan_in))
    if rule == "none":
        return 1.0
    raise ValueError(f"unknown scale {rule!r}; known: {', '.join(get_args(Scale))}.")


@checked
def scale_by_matrix_shape(
    rule: Scale = "keller", *, axes: Axes = DEFAULT_AXES
) -> optax.GradientTransformation:
    """Multiplies every matrix by `shape_factor` of its shape, including the parts of a split leaf.

    Args:
      rule: ``"keller"``, ``"moonlight"``, ``"spectral"`` or ``"none"``.
      axes: which axes of a leaf are rows (in) and columns (out).

    Raises:
      ValueError: for an unknown rule, or a leaf that is not a matrix.

    Source: Jordan, ``muon.py``; Liu et al., 2025, https://arxiv.org/abs/2502.16982 (Moonlight);
    Bernstein and Newhouse, 2024, https://arxiv.org/abs/2409.20325 (spectral).

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_matrix_shape("spectral")
      >>> tx.update(jnp.ones((1, 4)), tx.init(jnp.ones((1, 4))))[0]
      Array([[2., 2., 2., 2.]], dtype=float32)
    """

    def scaled(piece: jax.Array, rows: int, columns: int) -> jax.Array:
        return cast(shape_factor(rule, rows, columns) * wide(piece), piece.dtype)

    def of_leaf(leaf: jax.Array, found: Layout) -> jax.Array:
        if len(found.pieces) == 1:
            # Matrices of one shape: the leaf stays as it is, wherever a mesh cuts it.
            return scaled(leaf, *found.pieces[0][1:])
        return map_pieces(lambda piece: scaled(piece, *piece.shape[1:]), [found], leaf)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        done = list(map(of_leaf, leaves, layouts_of(updates, axes)))
        return jax.tree.unflatten(structure, done), state

    return transformation(no_state(axes), update)
