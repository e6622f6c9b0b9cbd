"""SOAP-Muon: SOAP's direction, orthogonalized."""

from collections.abc import Callable, Collection

import jax
import optax

from ..core.arguments import checked
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask, decay_after_first
from .links.matrix_scale import Scale, scale_by_matrix_shape
from .links.orthogonal import orthogonalize
from .matrix.batch.refresh import REFRESH, Refresh
from .matrix.shape.blocks import UNCUT, Blocks
from .matrix.shape.matrices import Axes
from .roles import MATRIX_ROLES, Role, Rules
from .soap import scale_by_soap


@checked
def soap_muon(
    learning_rate: optax.ScalarOrSchedule = 0.01,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    refresh: Refresh = REFRESH,
    blocks: Blocks = UNCUT,
    polar: Callable[[jax.Array], jax.Array] | None = None,
    scale: Scale = "moonlight",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    rules: Rules | None = None,
    roles: Collection[Role] = MATRIX_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
) -> optax.GradientTransformation:
    r"""SOAP's direction, orthogonalized: ``scale_by_soap → orthogonalize → scale_by_matrix_shape``.

    For research: on our small task it ended level with Muon, at the cost of SOAP and Muon together.

    State: that of :func:`soap` for matrices, and 8 bytes per other parameter. Starting rates:
    AdamW's, or a few times it.

    Args:
      learning_rate: a number or a schedule; with ``"moonlight"`` one that suits Muon and AdamW.
      b1, b2, eps, shampoo_b2, refresh, blocks: as for :func:`scale_by_soap`.
      polar: maps a batch of matrices to their polar factors; by default ``NewtonSchulz()``.
      scale: the factor for a matrix's shape, as for :func:`muon`.
      weight_decay, weight_decay_mask, rules, roles, fallback: as for :func:`shampoo`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Source: the records of modded-nanogpt's optimizer track, 2026 (SOAP-Muon); marin #6082.

    Example:
      >>> import ravine
      >>> tx = ravine.soap_muon(0.01, weight_decay=0.1)
    """

    def direction(axes: Axes) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_soap(
                b1,
                b2,
                eps,
                shampoo_b2=shampoo_b2,
                refresh=refresh,
                blocks=blocks,
                axes=axes,
            ),
            orthogonalize(polar, axes=axes),
            scale_by_matrix_shape(scale, axes=axes),
        )

    return by_role(
        "soap_muon",
        direction,
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=roles,
        fallback=fallback,
        decay=decay_after_first(weight_decay, weight_decay_mask),
        gated=True,
    )
