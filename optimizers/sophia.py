"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped coordinate by coordinate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import (
    bias_correction,
    cast,
    cast_like,
    ema,
    increment,
    scalar,
    wide,
    wide_zeros_like,
)
from ..core.checks import check_decay_rates, check_non_negative, check_whole
from ..core.fit import check_fit
from ..core.mapped import cond
from ..core.transformation import with_extra_args
from ..core.tree_checks import check_params_given
from .links.curvature import Curvature
from .links.decay import DecayForm, Mask, with_decay


class ScaleBySophiaState(NamedTuple):
    """State of `scale_by_sophia`."""

    count: jax.Array  # int32 scalar, updates made so far
    win_rate: jax.Array  # float32 scalar, share of the coordinates not clipped at the last update
    mu: optax.Updates  # like params, mu_dtype: mean of gradients
    nu: optax.Updates  # like params, nu_dtype: mean of estimates of the Hessian's diagonal


@checked
def scale_by_sophia(
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.04,
    eps: float = 1e-15,
    *,
    every: int = 10,
    start: int = 0,
    correct_bias: bool = False,
    seed: int = 0,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum over curvature, clipped to [-1, 1].

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        h_t = \beta_2 h_{t-k} + (1 - \beta_2) \hat h_t, \qquad
        u_t = \operatorname{clip}\Big( \frac{m_t}{\max(\rho h_t, \epsilon)}, -1, 1 \Big)

    The update takes ``curvature=``, a function from parameters and a random key to :math:`\hat h`,
    which :func:`gauss_newton_bartlett` or :func:`hutchinson` makes from the current batch. It is called
    every k updates, inside ``lax.cond``; its key comes from `seed` and the count, so that all devices
    and restarts agree. In ``optax.masked`` and ``optax.partition`` give the estimator ``params=``. A
    new estimate is already used in the step that makes it.

    ``win_rate`` in the state, the share of coordinates that are not clipped, is healthy between 0.1
    and 0.5; tune `rho` by it.

    Args:
      b1: :math:`\beta_1` in [0, 1).
      b2: :math:`\beta_2` in [0, 1), of the estimates.
      rho: :math:`\rho`, not negative; the paper's :math:`\gamma`.
      eps: smallest denominator, positive.
      every: k, updates from one estimate to the next.
      start: the count at the first estimate; until then :math:`h = 0`, and steps are signs.
      correct_bias: divide m by :math:`1 - \beta_1^t`, as Optax does.
      seed: the seed of the keys.
      mu_dtype: dtype of the momentum; by default at least float32.
      nu_dtype: dtype of the curvature; by default at least float32.

    Raises:
      ValueError: for values out of range, or at the update without parameters or ``curvature=``.

    Source: Liu et al., 2023, https://arxiv.org/abs/2305.14342; Liuhong99/Sophia, ``sophia.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.scale_by_sophia(rho=1.0, b1=0.0, b2=0.0), jnp.zeros(2)
      >>> loss = lambda p: jnp.sum(p**2)
      >>> curvature = ravine.hutchinson(loss)
      >>> tx.update(jnp.array([1.0, 9.0]), tx.init(params), params, curvature=curvature)[0]
      Array([0.5, 1. ], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2)
    check_non_negative(rho=rho, eps=eps)
    if isinstance(eps, (int, float)) and eps == 0:
        raise ValueError("eps must be positive, or a coordinate without curvature divides by 0.")
    check_whole(0, start=start)
    check_whole(1, every=every)

    def whole(number: Any) -> jax.Array:
        return jnp.asarray(number).astype(jnp.int32)

    def init(params: optax.Params) -> ScaleBySophiaState:
        return ScaleBySophiaState(
            count=jnp.zeros([], jnp.int32),
            win_rate=jnp.zeros([], jnp.float32),
            mu=wide_zeros_like(params, mu_dtype),
            nu=wide_zeros_like(params, nu_dtype),
        )

    def update(
        updates: optax.Updates,
        state: ScaleBySophiaState,
        params: optax.Params | None = None,
        *,
        curvature: Curvature | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ScaleBySophiaState]:
        del extra
        check_params_given(params, "Sophia")
        if curvature is None:
            raise ValueError(
                "Sophia needs an estimator of the curvature: call tx.update(grads, state, params, "
                "curvature=ravine.gauss_newton_bartlett(logits_fn)), or hutchinson(loss_fn)."
            )

        def estimated(nu: optax.Updates) -> optax.Updates:
            key = jax.random.fold_in(jax.random.key(whole(seed)), state.count)
            estimate = curvature(params, key)
            check_fit("curvature", estimate, nu)
            found = _part_like(estimate, nu)
            return cast_like(ema(found, nu, b2), nu)

        since = state.count - whole(start)
        due = (since >= 0) & (since % whole(every) == 0)
        nu = cond(due, estimated, lambda nu: nu, state.nu)
        mu = ema(updates, state.mu, b1)
        count = increment(state.count)
        weight = bias_correction(b1, count) if correct_bias else 1.0

        def scaled(h: jax.Array) -> jax.Array:
            return scalar(rho, h.dtype) * h * scalar(weight, h.dtype)

        def clipped(g: jax.Array, m: jax.Array, h: jax.Array) -> jax.Array:
            below = jnp.maximum(scaled(h), scalar(eps, h.dtype) * scalar(weight, h.dtype))
            ratio = jnp.clip(m / cast(below, m.dtype), -1, 1)
            # An overflow must not look like an ordinary step.
            return cast(jnp.where(jnp.isfinite(m), ratio, m), g.dtype)

        wide_nu = jax.tree.map(wide, nu)
        directions = jax.tree.map(clipped, updates, mu, wide_nu)
        wins = jax.tree.map(lambda m, h: jnp.abs(m) < cast(scaled(h), m.dtype), mu, wide_nu)
        state = ScaleBySophiaState(count, _share(wins), cast_like(mu, state.mu), nu)
        return directions, state

    return with_extra_args(init, update)


def _share(tree: Any) -> jax.Array:
    """The share of true values among all booleans of a tree."""
    leaves = jax.tree.leaves(tree)
    true = (jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves)
    return sum(true, jnp.zeros([], jnp.float32)) / max(sum(leaf.size for leaf in leaves), 1)


def _part_like(found: Any, like: Any) -> Any:
    """`found` without the leaves that `optax.masked` or `optax.partition` took out of `like`."""
    is_taken = lambda node: isinstance(node, optax.MaskedNode)
    return jax.tree.map(
        lambda node, part: node if is_taken(node) else cast(part, wide(node).dtype),
        like,
        found,
        is_leaf=is_taken,
    )


@checked
def sophia_g(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.04,
    eps: float = 1e-15,
    *,
    every: int = 10,
    start: int | None = None,
    seed: int = 0,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-G with decoupled weight decay: ``curvature=gauss_newton_bartlett(logits_fn)``.

    For language models. Labels sampled from the model itself estimate the curvature every ten steps,
    which costs one more backward pass each time.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` of :func:`scale_by_sophia`. The authors multiply by the number of tokens, ``bs``,
    where the curvature is used; here the estimator does it. They clip the sampled gradient to norm 1 in
    their training script.

    State: 8 bytes per parameter. Starting rates: somewhat below AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, rho, eps, every, seed, mu_dtype, nu_dtype: as for :func:`scale_by_sophia`.
      start: the count at the first estimate; None for `every`, as in the authors' script; the paper has
        0.
      weight_decay: :math:`\lambda`, by default multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` and ``curvature=``.

    Raises:
      ValueError: as :func:`scale_by_sophia`.

    Source: as :func:`scale_by_sophia`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.sophia_g(0.1, start=0), jnp.zeros((2, 3))
      >>> inputs = jnp.ones((4, 2))
      >>> curvature = ravine.gauss_newton_bartlett(lambda params: inputs @ params)
      >>> updates, state = tx.update(params, tx.init(params), params, curvature=curvature)
    """
    check_whole(1, every=every)
    direction = scale_by_sophia(
        b1,
        b2,
        rho,
        eps,
        every=every,
        start=every if start is None else start,
        seed=seed,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    tx = with_decay(
        direction, learning_rate, weight_decay, weight_decay_mask, form=weight_decay_form
    )
    return optax.with_extra_args_support(tx)


@checked
def sophia_h(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.01,
    eps: float = 1e-12,
    *,
    every: int = 10,
    start: int = 0,
    correct_bias: bool = False,
    seed: int = 0,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformationExtraArgs:
    r"""Sophia-H with decoupled weight decay: ``curvature=hutchinson(loss_fn)``.

    For any loss that can be differentiated twice; an estimate costs one product with the Hessian.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` of :func:`scale_by_sophia`. The paper's algorithm; the authors published no code
    for it. ``optax.contrib.sophia`` uses an estimate one step after it was made, and corrects the
    momentum for its start.

    State: 8 bytes per parameter. Starting rates: somewhat below AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, rho, eps, every, start, correct_bias, seed, mu_dtype, nu_dtype: as for
        :func:`scale_by_sophia`.
      weight_decay: :math:`\lambda`, by default multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` and ``curvature=``.

    Raises:
      ValueError: as :func:`scale_by_sophia`.

    Source: as :func:`scale_by_sophia`.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> tx, params = ravine.sophia_h(0.1), jnp.ones(3)
      >>> loss = lambda params: jnp.sum(params**4)
      >>> grads = jax.grad(loss)(params)
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, curvature=ravine.hutchinson(loss)
      ... )
    """
    direction = scale_by_sophia(
        b1,
        b2,
        rho,
        eps,
        every=every,
        start=start,
        correct_bias=correct_bias,
        seed=seed,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
    )
    tx = with_decay(
        direction, learning_rate, weight_decay, weight_decay_mask, form=weight_decay_form
    )
    return optax.with_extra_args_support(tx)
