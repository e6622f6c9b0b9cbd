r"""SOAP: Adam in the eigenbasis of Shampoo's factors, and what follows from it.

The authors' code and this one agree in these points:

- The first gradient only sets the factors and their bases; no parameter moves or decays.
- A gradient never preconditions itself: it enters the statistics after the step.
- Both moments live in the rotated basis. At a refresh the first is rotated into the new one; the second
  is only *permuted* along with the columns of the basis, since squares cannot be rotated.
- The basis is refreshed by one QR step (`matrix/algebra/eigenbasis.py`), its columns sorted beforehand.
- Epsilon is added to the root of the second moment as it is; both bias corrections count from the second
  step on and scale the learning rate.

Three things differ. The authors decay the parameters after the step, which multiplies the step by
:math:`1 - \eta\lambda`; here decay is a link of its own, as in AdamW. Where statistics are singular,
the authors' code divides rounding errors by their own size; here they are set to zero
(:mod:`.matrix.algebra.eigenbasis`). And a new basis may rotate the first moment into directions in
which the second is still zero, as with rows that are rarely used; the authors' code then divides by
almost zero: a step of 18,000 times the learning rate in a test. Here the second moment is raised to
satisfy :math:`m^2 \le C^2 v`, a bound that Adam's moments always satisfy.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import bias_correction, increment
from ..core.checks import check_decay_rates, check_non_negative
from ..core.own_norm import OwnNorm
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask, decay_after_first
from .matrix.batch.refresh import REFRESH, Refresh
from .matrix.shape.blocks import UNCUT, Blocks, blockings_of
from .matrix.shape.matrices import Axes
from .preconditioners.adam_in_eigenbasis import (
    Moments,
    Step,
    new_basis,
    norms,
    stepped,
)
from .preconditioners.block_state import blocks_like, factors_like
from .preconditioners.blockwise import blockwise
from .preconditioners.tensors import Tensors
from .roles import Role, Rules
from .shampoo import SHAMPOO_ROLES


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`."""

    count: jax.Array  # int32 scalar, updates made so far, including the first, which has no effect
    mu: Any  # like params: a tuple (tensors) of blocks, the mean of gradients in the eigenbasis
    nu: Any  # the same: the mean of their squares
    bases: Any  # like params: a tuple (tensors) of tuples (axes) of Basis, or None without one


@checked
def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    refresh: Refresh = REFRESH,
    blocks: Blocks = UNCUT,
    precondition_vectors: bool = False,
    axes: Axes | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""The direction of SOAP.

    With the bases :math:`Q_L, Q_R` of the last refresh and :math:`k = t - 1`,

    .. math::
        G' &= Q_L^\top G Q_R, \qquad M' \leftarrow \beta_1 M' + (1 - \beta_1) G', \qquad
        V \leftarrow \beta_2 V + (1 - \beta_2) G'^2 \\
        u &= \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \,
            Q_L \frac{M'}{\sqrt{V} + \epsilon} Q_R^\top \\
        L &\leftarrow \beta_s L + (1 - \beta_s) GG^\top, \qquad
        Q_L \leftarrow \operatorname{qr}(L Q_L) \text{ every } T \text{ steps}

    and the same for the columns, or for every axis of a tensor. The first update is zero.

    If the squares of a block's gradient cannot be summed in float32 (something is not finite, or the
    norm is above 1.3e19), zeros replace the gradient for that step, and the statistics of the block do
    not change. A finite but far too large gradient enters the second moment and decays at the rate
    `b2`: put :func:`ravine.stability.clip_by_global_norm` before it, or
    :func:`ravine.stability.skip_step` around it.

    In directions without any gradient so far, bases keep their previous or identity columns, and
    rounding errors of the rotation there, up to 4e-6 of a block's size, are set to zero.

    An update cannot be differentiated (``jax.grad``, ``jax.jvp``), since bases are found by
    decompositions that have no derivatives.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second, in [0, 1).
      eps: added to the root of the second moment.
      shampoo_b2: decay rate of the factors' statistics; ``None`` takes `b2`.
      refresh: T, whether bases take turns, and which gradients update their statistics (every gradient
        updates the moments), see :class:`ravine.Refresh`; without a start.
      blocks: which axes have a basis, and how they are cut, see :class:`ravine.Blocks`; by default
        they are not cut.
      precondition_vectors: whether leaves with one axis get a basis too.
      axes: which axes of a leaf are rows and columns; ``None`` gives every axis of a leaf a basis.
      mu_dtype: dtype of the first moment; by default at least float32.
      nu_dtype: dtype of the second moment; by default at least float32.

    Raises:
      ValueError: for values out of range.

    Source: Vyas et al., 2024, https://arxiv.org/abs/2409.11321; nikhilvyas/SOAP, ``soap.py``.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> tx, g = ravine.scale_by_soap(), jnp.diag(jnp.array([3.0, 4.0]))
      >>> state, update = jax.jit(tx.init)(jnp.zeros((2, 2))), jax.jit(tx.update)
      >>> _, state = update(g, state)  # sets the bases only
      >>> update(g, state)[0].round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)
    check_non_negative(eps=eps)
    if shampoo_b2 is not None:
        check_decay_rates(shampoo_b2=shampoo_b2)
    refresh.check_at_once("SOAP")
    statistics_b2 = b2 if shampoo_b2 is None else shampoo_b2
    blockings = functools.partial(
        blockings_of, axes=axes, blocks=blocks, vectors=precondition_vectors
    )

    def init(params: optax.Params) -> ScaleBySoapState:
        found = blockings(params)
        return ScaleBySoapState(
            count=jnp.zeros([], jnp.int32),
            mu=blocks_like(params, found, mu_dtype),
            nu=blocks_like(params, found, nu_dtype),
            bases=factors_like(params, found, new_basis),
        )

    def step(
        updates: optax.Updates,
        state: ScaleBySoapState,
        tensors: Tensors,
        *,
        b1: float,
        b2: float,
        eps: float,
        statistics_b2: float,
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        count = increment(state.count)
        k = jnp.maximum(count - 1, 1)
        adam = Step(
            b1=b1,
            b2=b2,
            statistics_b2=refresh.decay(statistics_b2),
            eps=eps,
            moves=count > 1,
            correction=jnp.sqrt(bias_correction(b2, k)) / bias_correction(b1, k),
            learns=refresh.learning_from_first(count),
        )
        mu, nu, bases = tensors.kept(state.mu, state.nu, state.bases)
        moments, blocks = list(map(Moments, mu, nu)), tensors.opened(updates)
        directions, moments, bases = stepped(tensors, blocks, moments, bases, adam, refresh, count)
        mu, nu = ([getattr(each, name) for each in moments] for name in Moments._fields)
        state = ScaleBySoapState(count, *tensors.to_keep(mu, nu, bases))
        return tensors.closed(directions), state

    def norm(
        updates: optax.Updates, state: ScaleBySoapState, tensors: Tensors, *, eps: float, **_: float
    ) -> list[OwnNorm]:
        nu, bases = tensors.kept(state.nu, state.bases)
        return norms(tensors, tensors.opened(updates), nu, bases, eps)

    numbers = {"b1": b1, "b2": b2, "eps": eps, "statistics_b2": statistics_b2}
    return blockwise("scale_by_soap", blockings, init, step, norm, refresh, **numbers)


@checked
def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    shampoo_b2: float | None = None,
    refresh: Refresh = REFRESH,
    blocks: Blocks = UNCUT,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Mask | None = None,
    rules: Rules | None = None,
    roles: Collection[Role] = SHAMPOO_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
) -> optax.GradientTransformation:
    r"""SOAP for matrices, embeddings and heads, another optimizer for everything else.

    For large batches, expensive steps and memory to spare: Adam in the eigenbasis of Shampoo's factors.

    .. math::
        L_t &= \beta_2 L_{t-1} + (1 - \beta_2) G_t G_t^\top, \qquad
        R_t = \beta_2 R_{t-1} + (1 - \beta_2) G_t^\top G_t \\
        \theta_t &= \theta_{t-1} - \eta_t \, \bigl( Q_L \operatorname{Adam}(Q_L^\top G_t Q_R) Q_R^\top
            + \lambda \theta_{t-1} \bigr)

    with the eigenbases :math:`Q_L` of L and :math:`Q_R` of R, refreshed by a QR step every ten steps.
    See :func:`scale_by_soap` for all details. The first step sets the bases and moves nothing.

    State: 8 bytes per parameter and 8 per element of a factor: 27 bytes per parameter for GPT-2, 15
    for LLaMA-2 7B, where the longest axes get no factor. Starting rates: 3e-3, the authors', or
    AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, shampoo_b2, refresh, blocks, mu_dtype, nu_dtype: as for
        :func:`scale_by_soap`.
      weight_decay, weight_decay_mask, rules, roles, fallback: as for :func:`shampoo`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for values out of range, and at `init` for parameters that no rule covers or that were
        assigned to it but are not matrices.

    Source: as :func:`scale_by_soap`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.soap(3e-3, refresh=ravine.Refresh(every=5))
      >>> state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
      >>> for _ in range(3):
      ...     grads = params  # of half the sum of squares
      ...     updates, state = update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(params["dense"]["kernel"].max() < 1)
      True
    """
    direction = functools.partial(
        scale_by_soap,
        b1,
        b2,
        eps,
        shampoo_b2=shampoo_b2,
        refresh=refresh,
        blocks=blocks,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return by_role(
        "soap",
        lambda axes: direction(axes=axes),
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=roles,
        fallback=fallback,
        decay=decay_after_first(weight_decay, weight_decay_mask),
        gated=True,
    )
