"""The quadratic norm in which an optimizer for matrices sees a gradient."""

from typing import Any

import optax

from ..core.own_norm import NoOwnNorm as NoOwnNorm
from ..core.own_norm import OwnNorm, norms_in


def own_norms(
    tx: optax.GradientTransformation, grads: optax.Updates, opt_state: Any
) -> dict[str, OwnNorm]:
    r"""For every parameter whose gradient `tx` multiplies by a symmetric P: :math:`\langle G, P[G]
    \rangle`, and the trace of P.

    P is that of the state before the gradient, so it knows nothing of the gradient, and what is
    estimated in this norm is unbiased.

    ==================  ===================================================================
    `scale_by_shampoo`  the product of the roots it holds, one for each axis of a block
    `scale_by_soap`     :math:`1 / (\sqrt{v} + \epsilon)` in the eigenbasis of a block
    `..._kl_shampoo`    :math:`1 / (\sqrt{\lambda_a \lambda_b^\top} + \epsilon)` in the same
    `scale_by_muon`     :math:`(M M^\top)^{-1/2}` of the momentum, by eigendecomposition
    ==================  ===================================================================

    A graft, a factor for a matrix's shape and learning rates are not part of it, nor is what other
    links do before and after. On a mesh, every device works on its own blocks.

    Args:
      tx: the whole optimizer; under an `Auto` mesh `on_mesh`, as for the update.
      grads: gradients of all its parameters.
      opt_state: its state.

    Returns:
      Norms by path, of no other parameters.

    Raises:
      NoOwnNorm: a `ValueError`, for optimizers whose step is no such product: Muon with a `pre` or a
        `post` (NorMuon, AdaMuon), `orthogonalize` without Muon's momentum (SOAP-Muon), two
        preconditioners one after the other.
      ValueError: for a state that is not that of `tx`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> from ravine.optimizers.own_norms import own_norms
      >>> tx, params = ravine.scale_by_shampoo(), {"kernel": jnp.ones((2, 3))}
      >>> float(own_norms(tx, params, tx.init(params))["kernel"].square)  # roots are identities
      6.0
    """
    return norms_in(tx, grads, opt_state)
