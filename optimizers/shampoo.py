r"""Shampoo: a preconditioner for every axis of every block.

The pipeline of :func:`scale_by_shampoo`, block by block: ``statistics → (every T steps) roots →
direction of the momentum → graft``; then decay and learning rate, each a transformation of its own.
Failures stay within their block: a non-finite gradient does not change the statistics, and if a root
fails its certificate, the previous root stays in use.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import increment, momentum
from ..core.checks import check_decay_rates, number
from ..core.own_norm import OwnNorm
from ..core.paths import path_string
from .by_role import FALLBACK, Fallback, by_role
from .links.decay import Mask
from .matrix.batch.refresh import REFRESH, Refresh
from .matrix.shape.blocks import BLOCKS, Blocks, blockings_of
from .matrix.shape.matrices import Axes
from .preconditioners.block_graft import BlockGraft
from .preconditioners.block_state import (
    blocks_like,
    factors_like,
    fields,
    nothing_like,
    ones_like_scalars,
    zero_unless,
)
from .preconditioners.blockwise import blockwise
from .preconditioners.inverse_roots import Preconditioner
from .preconditioners.options import FACTORS, GRAFTING, ROOTS, Factors, Grafting, Roots
from .preconditioners.tensors import Tensors
from .roles import Role, Rules

SHAMPOO_ROLES: tuple[Role, ...] = ("matrix", "convolution", "embedding", "head")


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`."""

    count: jax.Array  # int32 scalar, updates made so far
    mu: Any  # like params: a tuple (tensors) of blocks, mu_dtype: mean of gradients
    nu: Any  # likewise, nu_dtype: second moments of the graft; None if it has none
    factors: (
        Any  # like params: a tuple (tensors) of tuples (axes) of Factor, or None without a factor
    )
    graft_ratio: (
        Any  # like params: a tuple of [*batch, *counts], by how much the graft scaled a block
    )


@checked
def scale_by_shampoo(
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    *,
    nesterov: bool = False,
    refresh: Refresh = REFRESH,
    blocks: Blocks = BLOCKS,
    factors: Factors = FACTORS,
    roots: Roots = ROOTS,
    graft: Grafting = GRAFTING,
    axes: Axes | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Shampoo's direction: momentum, preconditioned along every axis, with a grafted size.

    For every block :math:`G` of order k, with mode-i unfoldings :math:`G_{(i)}`,

    .. math::
        L_i &\leftarrow \beta_2 L_i + (1 - \beta_2)\, G_{(i)} G_{(i)}^\top, \qquad
        P_i = \bigl(L_i / (1 - \beta_2^t) + \rho_i I\bigr)^{-1/(2k)} \quad \text{every } T
            \text{ steps} \\
        U &= \hat M \times_1 P_1 \cdots \times_k P_k, \qquad
        u = \frac{\lVert D \rVert}{\lVert U \rVert} U

    with the momentum :math:`\hat M` (mean of gradients, corrected for its start) and the step
    :math:`D` of the graft; :math:`u = D` before the start step. For matrices, :math:`P_1 \hat M P_2`
    with exponents of -1/4. New roots include the gradient of their own step, if it is one of those
    that update the statistics (``refresh.statistics_every``).

    If the squares of a block's gradient cannot be summed in float32 (something is not finite, or the
    norm is above 1.3e19), zeros replace the gradient for that step, and the statistics of the block do
    not change. A finite but far too large gradient decays from the statistics at the rate `b2`;
    :func:`ravine.stability.clip_by_global_norm` before it, or :func:`ravine.stability.skip_step` around
    it, keeps it out.

    A scalar has no factor, and so takes the graft's step; a vector has one factor for all its elements,
    unless it is longer than ``blocks.bound``. :func:`shampoo` sends vectors to another optimizer.

    An update cannot be differentiated in reverse mode (``jax.grad``), since roots are found in loops
    without a fixed length; forward mode (``jax.jvp``) works.

    Args:
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of statistics, in [0, 1]; 1 sums them up.
      eps: the graft's epsilon.
      nesterov: look-ahead momentum.
      refresh: T, the first step that is preconditioned, and which gradients update the statistics, see
        :class:`ravine.Refresh`; with a start at infinity every step is the graft's.
      blocks: which axes have a factor, and how they are cut, see :class:`ravine.Blocks`.
      factors: which statistics factors keep, and in which form, see :class:`ravine.Factors`.
      roots: :math:`\rho`, how roots are computed and which are trusted, see :class:`ravine.Roots`.
      graft: which optimizer's step D is, see :class:`ravine.Grafting`.
      axes: which axes of a leaf are rows and columns; ``None`` gives every axis of a leaf a factor.
      mu_dtype: dtype of the momentum; by default at least float32.
      nu_dtype: dtype of the graft's second moment; by default at least float32.

    Raises:
      ValueError: for values out of range.

    Source: Gupta et al., 2018, https://arxiv.org/abs/1802.09568; Shi et al., 2023,
    https://arxiv.org/abs/2309.06497; facebookresearch/optimizers, ``distributed_shampoo``.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> options = {"refresh": {"every": 1}, "roots": {"ridge": 0}, "graft": {"step": "none"}}
      >>> tx = ravine.scale_by_shampoo(0.0, 1.0, **options)
      >>> state = jax.jit(tx.init)(jnp.zeros((2, 2)))
      >>> updates, _ = jax.jit(tx.update)(jnp.diag(jnp.array([3.0, 4.0])), state)
      >>> updates.round(4)  # the first step of Shampoo is the polar factor
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    check_decay_rates(b1=b1)
    if number("b2", b2) != 1:
        check_decay_rates(b2=b2)
    factors.check_ridge(roots.ridge)
    roots.check_need(refresh)
    per = "none" if graft.step == "none" else graft.per
    lent = graft.magnitude(b2, eps)

    second_moments = nothing_like
    if lent.has_moments:
        second_moments = functools.partial(blocks_like, dtype=nu_dtype)
    preconditioner = functools.partial(
        Preconditioner, factors=factors, roots=roots, schedule=refresh
    )
    statistics_b2 = refresh.decay(b2)
    first = preconditioner(statistics_b2)
    # KL statistics need whole blocks: they are sums over products of both factors.
    sums = factors.statistics != "kl"
    blockings = functools.partial(blockings_of, axes=axes, blocks=blocks, sums=sums)

    def init(params: optax.Params) -> ScaleByShampooState:
        found = blockings(params)
        paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        first.check(paths, found)
        return ScaleByShampooState(
            count=jnp.zeros([], jnp.int32),
            mu=blocks_like(params, found, mu_dtype),
            nu=second_moments(params, found),
            factors=factors_like(params, found, first.factor),
            graft_ratio=ones_like_scalars(params, found),
        )

    def step(
        updates: optax.Updates,
        state: ScaleByShampooState,
        tensors: Tensors,
        *,
        b1: float,
        eps: float,
        statistics_b2: float,
        graft_b2: float,
    ) -> tuple[optax.Updates, ScaleByShampooState]:
        count, shampoo = increment(state.count), preconditioner(statistics_b2)
        mu, nu, kept = tensors.kept(state.mu, state.nu, state.factors)
        gradients = tensors.opened(updates)
        usable, kept = shampoo.learn(tensors, gradients, kept, count)
        seen = list(map(zero_unless, usable, gradients))
        mu, means = momentum(seen, mu, b1, count, nesterov=nesterov)
        size = lent._replace(b2=graft_b2, eps=eps)
        steps, nu = size.update(seen, means, nu, count)
        kept = shampoo.refresh(tensors, kept, count)
        grafting = BlockGraft(per, refresh.started(count))
        blocks, ratios = shampoo.apply(tensors, means, steps, kept, grafting)
        if per == "parameter":
            distrusted = [shampoo.distrusted(fields(each, "record")) for each in kept]
            blocks, ratios = grafting.of_parameters(tensors, blocks, steps, distrusted)
        state = ScaleByShampooState(count, *tensors.to_keep(mu, nu, kept, ratios))
        return tensors.closed(blocks), state

    def norm(
        updates: optax.Updates,
        state: ScaleByShampooState,
        tensors: Tensors,
        *,
        statistics_b2: float,
        **_: float,
    ) -> list[OwnNorm]:
        (kept,) = tensors.kept(state.factors)
        return preconditioner(statistics_b2).norms(tensors, tensors.opened(updates), kept)

    numbers = {"b1": b1, "eps": eps, "statistics_b2": statistics_b2, "graft_b2": lent.b2}
    return blockwise("scale_by_shampoo", blockings, init, step, norm, refresh, **numbers)


@checked
def shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    *,
    nesterov: bool = False,
    refresh: Refresh = REFRESH,
    blocks: Blocks = BLOCKS,
    factors: Factors = FACTORS,
    roots: Roots = ROOTS,
    graft: Grafting = GRAFTING,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    rules: Rules | None = None,
    roles: Collection[Role] = SHAMPOO_ROLES,
    fallback: optax.GradientTransformation | Fallback = FALLBACK,
) -> optax.GradientTransformation:
    r"""Shampoo for matrices, embeddings and heads, another optimizer for everything else.

    For runs with memory to spare and expensive steps. Each block of a matrix is preconditioned from
    both sides, and takes the length of Adam's step, so that AdamW's learning rates fit.

    .. math::
        L_t &= \beta_2 L_{t-1} + (1 - \beta_2) G_t G_t^\top, \qquad
        R_t = \beta_2 R_{t-1} + (1 - \beta_2) G_t^\top G_t \\
        U_t &= \hat L^{-1/4} \hat M_t \hat R^{-1/4}, \qquad
        \theta_t = \theta_{t-1} - \eta_t \left( \frac{\lVert D_t \rVert}{\lVert U_t \rVert} U_t
            + \lambda \theta_{t-1} \right)

    with the momentum :math:`\hat M_t` and Adam's step :math:`D_t`; the roots, with a ridge, are
    computed every ten steps. See :func:`scale_by_shampoo` for all details. A parameter's role decides
    which optimizer it gets; a parameter that no rule covers is refused, and :func:`explain` shows the
    result.

    State: about 24 bytes per parameter; 16 with ``Factors(packed=True)``. Starting rates: AdamW's.

    Args:
      learning_rate: a number or a schedule. With a graft, one that suits the graft.
      b1, b2, eps, nesterov, refresh, blocks: as for :func:`scale_by_shampoo`.
      factors, roots, graft, mu_dtype, nu_dtype: as for :func:`scale_by_shampoo`.
      weight_decay: :math:`\lambda`, multiplied by the learning rate; also that of the default
        fallback.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.
      rules: role rules; by default ``ravine.COMMON_RULES``.
      roles: the roles that Shampoo takes; all need rows and columns.
      fallback: the optimizer of all other parameters (norms, biases): complete with its learning rate,
        or AdamW with the options of :class:`ravine.Fallback`, by default at the same learning rate.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params``.

    Raises:
      ValueError: for values out of range, and at `init` for parameters that no rule covers or that were
        assigned to it but are not matrices.

    Source: as :func:`scale_by_shampoo`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ravine
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = ravine.shampoo(1e-3, refresh=ravine.Refresh(every=5), weight_decay=0.1)
      >>> state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
      >>> for _ in range(3):
      ...     grads = params  # of half the sum of squares
      ...     updates, state = update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(params["dense"]["kernel"].max() < 1)
      True
    """
    direction = functools.partial(
        scale_by_shampoo,
        b1,
        b2,
        eps,
        nesterov=nesterov,
        refresh=refresh,
        blocks=blocks,
        factors=factors,
        roots=roots,
        graft=graft,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    return by_role(
        "shampoo",
        lambda axes: direction(axes=axes),
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        rules=rules,
        roles=roles,
        fallback=fallback,
        gated=True,
    )
