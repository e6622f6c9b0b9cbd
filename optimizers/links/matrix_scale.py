"""How large the update of a matrix is, given its shape."""

import math
from typing import Literal, get_args

import jax
import optax

from ...core.arguments import checked
from ...core.arithmetic import cast, wide
from ..matrix.shape.matrices import DEFAULT_AXES, Axes, stateless_on_matrices

Scale = Literal["keller", "moonlight", "spectral", "none"]


def shape_factor(rule: Scale, fan_in: int, fan_out: int) -> float:
    r"""What an orthogonal `[fan_in, fan_out]` matrix is multiplied by.

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
    """Multiplies every matrix by `shape_factor` of its own shape, parts of a split leaf by theirs.

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
    shape_factor(rule, 1, 1)

    def scaled(piece_LxMxN: jax.Array) -> jax.Array:
        factor = shape_factor(rule, *piece_LxMxN.shape[1:])
        return cast(factor * wide(piece_LxMxN), piece_LxMxN.dtype)

    return stateless_on_matrices(scaled, axes)
