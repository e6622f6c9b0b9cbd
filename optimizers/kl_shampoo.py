r"""KL-Shampoo: factors that minimise a divergence, not a norm, with their own averages of eigenvalues.

Each factor is updated with the gradient whitened by the *other* one. The objective does not change when
one factor is multiplied by c and the other divided by it, and a moving average drifts along that
direction: exponentially fast without the division by the other side's size, and even with it by
:math:`\tfrac12 (1 - \beta_2)^2 (n/m - m/n)` per step where eigenvalues are computed from the factors,
until float32 overflows. Separate averages of the eigenvalues slow the drift to :math:`(1 - \beta_2)^2
(1/m - 1/n)`, and at every refresh both factors are brought to one scale, which changes nothing in exact
arithmetic.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import increment
from ..core.checks import check_decay_rates, check_non_negative, check_positive
from ..core.once import after
from ..core.own_norm import OwnNorm
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask, decay_after_first
from .matrix.batch.refresh import REFRESH, Refresh
from .matrix.shape.blocks import UNCUT, Blocks, blockings_of
from .matrix.shape.matrices import Axes
from .preconditioners.block_state import blocks_like, factors_like
from .preconditioners.blockwise import blockwise
from .preconditioners.kl_eigenbasis import KLEigenbasis, norms, refreshed_factors, stepped
from .preconditioners.tensors import Tensors
from .roles import Role, Rules
from .shampoo import SHAMPOO_ROLES


class ScaleByKLShampooState(NamedTuple):
    """State of `scale_by_kl_shampoo`."""

    count: jax.Array  # int32 scalar, updates made so far, including the first, which has no effect
    mu: Any  # like params: a tuple (tensors) of blocks, mu_dtype: mean of gradients
    factors: Any  # like params: a tuple (tensors) of tuples (axes) of KLFactor, or None without one


@checked
def scale_by_kl_shampoo(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    *,
    refresh: Refresh = REFRESH,
    initial_eigenvalue: float = 0.1,
    max_inverse_root: float = 4000.0,
    balance: bool = True,
    blocks: Blocks = UNCUT,
    axes: Axes | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""The direction of KL-Shampoo: :math:`S_a^{-1/2} M S_b^{-1/2}`, with no second moment.

    With bases :math:`Q`, eigenvalues :math:`\lambda` (both from the previous step), and
    :math:`P = Q_a^\top G Q_b` of a matrix `[m, n]`,

    .. math::
        u &= Q_a \frac{Q_a^\top M Q_b}{\sqrt{\lambda_a \lambda_b^\top} + \epsilon} Q_b^\top \\
        S_a &\leftarrow \beta_2 S_a + \tfrac{1 - \beta_2}{n} \, G Q_b \Lambda_b^{-1} Q_b^\top G^\top,
        \qquad \lambda_{a,i} \leftarrow \beta_2 \lambda_{a,i} + (1 - \beta_2)
            \operatorname{mean}_j P_{ij}^2 / \lambda_{b,j}

    and the same for b, and :math:`Q \leftarrow \operatorname{qr}(SQ)`, unsorted, every T steps. Nothing
    is corrected for its start. The first update is zero. Tensors of higher order are whitened along all
    other axes, each with the values of the previous step (the authors' code for three axes mixes old
    and new ones).

    The step is not bounded: the gradient does not enter the eigenvalues that divide it, so a gradient
    1e4 times larger than usual moves the parameters 1e4 times as far. Put
    :func:`ravine.stability.clip_by_global_norm` before it, or :func:`ravine.stability.skip_step` around
    it. The gradient of a block is replaced by zeros only if its squares, or those of the whitened
    block, cannot be summed in float32.

    Nor does the step have Adam's size, here or in the authors' code. It starts at ten times the
    momentum (`initial_eigenvalue`), and for a matrix m x n it is at most mn times that
    (`max_inverse_root`; 100 times, if both are below ten). For a 128 x 128 gradient with elements of
    3e-4 it is 0.3 % of Adam's after 10 steps, 2 % after 100 and 93 % after 400; with elements of 3e-6
    it is 6 % after 400. To use AdamW's learning rates, write
    ``ravine.graft(ravine.scale_by_kl_shampoo(), ravine.scale_by_adam())``; for a quick start, choose an
    `initial_eigenvalue` of the order of the gradients' elements. Without either, the rates that work
    are larger than AdamW's: of 16 trials on a byte-level model (`docs/results.md`), the best had 0.015,
    b1 0.75 and b2 0.79, and ended level with SOAP; the next best had 0.038 and 0.049.

    An update cannot be differentiated (``jax.grad``, ``jax.jvp``), as for :func:`scale_by_soap`.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of factors and eigenvalues.
      eps: added to the root of the product of eigenvalues.
      refresh: T, whether bases take turns, and which gradients update factors and eigenvalues, see
        :class:`ravine.Refresh`; without a start.
      initial_eigenvalue: the initial value of all eigenvalues.
      max_inverse_root: bound on :math:`\lambda^{-1/2}`; for n eigenvalues max(10, min(n, this)).
      balance: bring both factors to the same mean eigenvalue at every refresh.
      blocks: which axes have a factor, and how they are cut, see :class:`ravine.Blocks`; by default
        they are not cut.
      axes: which axes of a leaf are rows and columns; ``None`` gives every axis of a leaf a factor.
      mu_dtype: dtype of the momentum; by default at least float32.

    Raises:
      ValueError: for values out of range.

    Source: Lin et al., 2025, https://arxiv.org/abs/2509.03378; yorkerlin/KL-Methods, ``kl_opt.py``.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_kl_shampoo()
      >>> state, update = jax.jit(tx.init)(jnp.zeros((2, 2))), jax.jit(tx.update)
      >>> _, state = update(jnp.eye(2), state)  # sets the bases only
      >>> updates, state = update(jnp.eye(2), state)
      >>> updates.round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)
    check_non_negative(eps=eps)
    check_positive(initial_eigenvalue=initial_eigenvalue, max_inverse_root=max_inverse_root)
    refresh.check_at_once("KL-Shampoo")

    def eigenbasis(
        b1: float, b2: float, eps: float, initial_eigenvalue: float, max_inverse_root: float
    ) -> KLEigenbasis:
        return KLEigenbasis(b1, refresh.decay(b2), eps, initial_eigenvalue, max_inverse_root)

    numbers = {
        "b1": b1,
        "b2": b2,
        "eps": eps,
        "initial_eigenvalue": initial_eigenvalue,
        "max_inverse_root": max_inverse_root,
    }
    blockings = functools.partial(blockings_of, axes=axes, blocks=blocks, sums=False)

    def init(params: optax.Params) -> ScaleByKLShampooState:
        found = blockings(params)
        return ScaleByKLShampooState(
            count=jnp.zeros([], jnp.int32),
            mu=blocks_like(params, found, mu_dtype),
            factors=factors_like(params, found, eigenbasis(**numbers).factor),
        )

    def step(
        updates: optax.Updates,
        state: ScaleByKLShampooState,
        tensors: Tensors,
        **numbers: float,
    ) -> tuple[optax.Updates, ScaleByKLShampooState]:
        count = increment(state.count)
        is_first = count == 1
        learning = eigenbasis(**numbers)._replace(learns=refresh.learning_from_first(count))
        mu, kept = tensors.kept(state.mu, state.factors)
        directions, mu, factors = stepped(
            tensors,
            tensors.opened(updates),
            mu,
            kept,
            functools.partial(learning.step, is_first),
        )
        # They are turned by the old bases, which may be overwritten then.
        later = after(count, directions)
        factors = refreshed_factors(tensors, factors, refresh, later, balance=balance)
        mu, factors = tensors.to_keep(mu, factors)
        return tensors.closed(directions), ScaleByKLShampooState(count, mu, factors)

    def norm(
        updates: optax.Updates,
        state: ScaleByKLShampooState,
        tensors: Tensors,
        *,
        eps: float,
        **_: float,
    ) -> list[OwnNorm]:
        (kept,) = tensors.kept(state.factors)
        return norms(tensors, tensors.opened(updates), kept, eps)

    return blockwise("scale_by_kl_shampoo", blockings, init, step, norm, refresh, **numbers)


@checked
def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    *,
    refresh: Refresh = REFRESH,
    initial_eigenvalue: float = 0.1,
    balance: bool = True,
    blocks: Blocks = UNCUT,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Mask | None = None,
    rules: Rules | None = None,
    roles: Collection[Role] = SHAMPOO_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
) -> optax.GradientTransformation:
    r"""KL-Shampoo for matrices, embeddings and heads, another optimizer for everything else.

    For research: Shampoo whose factors minimize a Kullback–Leibler divergence to the gradients'
    covariance, with no graft and no second moment. Check the size of its first steps, see
    :func:`scale_by_kl_shampoo`.

    State: 4 bytes per parameter and 8 per element of a factor: 23 bytes per parameter for GPT-2, 11
    for LLaMA-2 7B. Starting rates: its steps do not have Adam's size; of 16 trials 0.015 was best.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, refresh, initial_eigenvalue, balance, blocks, mu_dtype: as for
        :func:`scale_by_kl_shampoo`.
      weight_decay, weight_decay_mask, rules, roles, fallback: as for :func:`shampoo`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for values out of range, and at `init` for parameters that no rule covers or that were
        assigned to it but are not matrices.

    Source: as :func:`scale_by_kl_shampoo`.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.kl_shampoo(1e-3, refresh=ravine.Refresh(every=5))
      >>> state = jax.jit(tx.init)(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
    """
    direction = functools.partial(
        scale_by_kl_shampoo,
        b1,
        b2,
        eps,
        refresh=refresh,
        initial_eigenvalue=initial_eigenvalue,
        balance=balance,
        blocks=blocks,
        mu_dtype=mu_dtype,
    )
    return by_role(
        "kl_shampoo",
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
