"""Adan: Adam with the change of the gradient as a second momentum, and restarts."""

from collections.abc import Callable
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
    lerp,
    root,
    scalar,
    wide,
    wide_dtype,
    wide_zeros_like,
)
from ..core.checks import check_decay_rates, check_some_eps
from ..core.transformation import transformation
from .links.decay import Mask, with_decay

RestartCondition = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps the updates made since the last restart, int32, and the path's length to a boolean."""


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`."""

    count: jax.Array  # int32 scalar, updates made since the last restart
    path: jax.Array  # float32 scalar, length of the path since then; 0 without a restart condition
    mu: optax.Updates  # like params, mu_dtype: mean of gradients
    delta: optax.Updates  # like params, mu_dtype: mean of their differences
    nu: optax.Updates  # like params, nu_dtype: mean of squares
    previous: optax.Updates  # like params, at least float32: the last gradient


@checked
def scale_by_adan(
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    restart_condition: RestartCondition | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Momentum and difference of gradients over their root mean square.

    .. math::
        d_t &= g_t - g_{t-1}, \qquad d_1 = 0 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t) + \beta_2 v_t / (1 - \beta_2^t)}
            {\sqrt{n_t / (1 - \beta_3^t) + \epsilon_\mathrm{root}} + \epsilon}

    The decay rates are those of the authors' file, one minus those of the paper. ``optax.adan`` (up to
    0.2.8) has :math:`1 - \beta_2` instead of :math:`\beta_2` in the last two lines.

    After a restart the next update is computed like the first. :func:`restart_adan` restarts, and so
    does an update after which `restart_condition` holds. The path passed to it is :math:`\sum_s \lVert
    u_s \rVert^2_{\sqrt{n_s}}` since the last restart, over all leaves: the paper's sum without the
    squared learning rate.

    Args:
      b1: :math:`\beta_1` in [0, 1), of gradients.
      b2: :math:`\beta_2` in [0, 1), of their differences.
      b3: :math:`\beta_3` in [0, 1), of squares.
      eps: added outside the root.
      eps_root: added inside the root. Optax has 1e-8.
      restart_condition: for example :func:`adan_restart_condition`; None, the official default, never
        restarts.
      mu_dtype: dtype of the means of gradients and differences; by default at least float32.
      nu_dtype: dtype of the mean of squares; by default at least float32.

    Raises:
      ValueError: for values out of range, or when both epsilons are zero.

    Source: Xie et al., 2022, https://arxiv.org/abs/2208.06677; sail-sg/Adan, ``adan.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_adan()
      >>> state = tx.init(jnp.zeros(1))
      >>> _, state = tx.update(jnp.array([1.0]), state)
      >>> round(float(tx.update(jnp.array([0.5]), state)[0][0]), 2)
      0.72
    """
    check_decay_rates(b1=b1, b2=b2, b3=b3)
    check_some_eps(eps, eps_root)

    def init(params: optax.Params) -> ScaleByAdanState:
        return ScaleByAdanState(
            count=jnp.zeros([], jnp.int32),
            path=jnp.zeros([], jnp.float32),
            mu=wide_zeros_like(params, mu_dtype),
            delta=wide_zeros_like(params, mu_dtype),
            nu=wide_zeros_like(params, nu_dtype),
            previous=wide_zeros_like(params),
        )

    def update(
        updates: optax.Updates, state: ScaleByAdanState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdanState]:
        del params
        count = increment(state.count)
        weights = [bias_correction(b, count) for b in (b1, b2, b3)]

        def difference(g: jax.Array, last: jax.Array) -> jax.Array:
            dtype = wide_dtype(g.dtype, last.dtype)
            return jnp.where(state.count == 0, 0, cast(g, dtype) - cast(last, dtype))

        def square(g: jax.Array, d: jax.Array, n: jax.Array) -> jax.Array:
            return lerp(jax.lax.square(cast(g, d.dtype) + scalar(b2, d.dtype) * d), n, b3)

        differences = jax.tree.map(difference, updates, state.previous)
        mu = ema(updates, state.mu, b1)
        delta = ema(differences, state.delta, b2)
        nu = jax.tree.map(square, updates, differences, state.nu)

        def direction(m: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
            of_m, of_v, of_n = (weight.astype(n.dtype) for weight in weights)
            ahead = cast(m, n.dtype) / of_m + scalar(b2, n.dtype) * cast(v, n.dtype) / of_v
            return ahead / root(n / of_n, eps, eps_root)

        directions = jax.tree.map(direction, mu, delta, nu)
        state = ScaleByAdanState(
            count,
            state.path,
            cast_like(mu, state.mu),
            cast_like(delta, state.delta),
            cast_like(nu, state.nu),
            cast_like(jax.tree.map(wide, updates), state.previous),
        )
        if restart_condition is not None:
            step = _squared_length(directions, nu)
            path = state.path + jnp.where(jnp.isfinite(step), step, 0)
            holds = restart_condition(count, path)
            state = _restarted(state._replace(path=path), holds)
        return cast_like(directions, updates), state

    return transformation(init, update)


def _squared_length(directions: Any, nu: Any) -> jax.Array:
    terms = jax.tree.map(lambda u, n: jnp.sum(jnp.square(u) * jnp.sqrt(n)), directions, nu)
    return sum((t.astype(jnp.float32) for t in jax.tree.leaves(terms)), jnp.zeros([], jnp.float32))


def _restarted(state: ScaleByAdanState, holds: Any = True) -> ScaleByAdanState:
    zeroed = jax.tree.map(
        lambda x: jnp.where(holds, jnp.zeros_like(x), x), state._replace(previous=None)
    )
    return zeroed._replace(previous=state.previous)


def restart_adan(opt_state: Any) -> Any:
    """`opt_state` with every Adan in it restarted: its next update is computed like the first.

    The moments and the count for bias correction go back to zero, and the next difference of gradients
    is zero, as in the authors' ``restart_opt``. Schedules continue.

    Args:
      opt_state: the state of :func:`adan`, or of anything that contains it (``optax.chain``,
        ``optax.partition``, :func:`accumulate`).

    Raises:
      ValueError: if there is no Adan in it.

    Source: sail-sg/Adan, ``adan.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.adan(0.1)
      >>> state = tx.init(jnp.zeros(1))
      >>> first, state = tx.update(jnp.array([1.0]), state, jnp.zeros(1))
      >>> again, _ = tx.update(jnp.array([1.0]), ravine.restart_adan(state), jnp.zeros(1))
      >>> bool(first == again)
      True
    """
    is_adan = lambda node: isinstance(node, ScaleByAdanState)
    if not any(map(is_adan, jax.tree.leaves(opt_state, is_leaf=is_adan))):
        raise ValueError(
            "this state holds no Adan to restart; give the state of an optimizer with adan."
        )
    return jax.tree.map(
        lambda node: _restarted(node) if is_adan(node) else node, opt_state, is_leaf=is_adan
    )


@checked
def adan_restart_condition(radius: float) -> RestartCondition:
    r"""The condition of the paper's theory: :math:`k \sum_{s \le k} \lVert \cdot \rVert^2 > R^2`.

    Args:
      radius: R, in the units of the path: the paper's radius divided by the learning rate.

    Raises:
      ValueError: unless the radius is positive.

    Source: Xie et al., 2022, https://arxiv.org/abs/2208.06677, algorithm 1 and theorem 3.

    Example:
      >>> import ravine
      >>> tx = ravine.adan(1e-3, restart_condition=ravine.adan_restart_condition(1e6))
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius!r}.")
    return lambda count, path: count.astype(path.dtype) * path > radius**2


@checked
def adan(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    no_prox: bool = False,
    restart_condition: RestartCondition | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
) -> optax.GradientTransformation:
    r"""Adan with proximal weight decay: Nesterov momentum from differences of gradients.

    For recipes that use it. It looks ahead without evaluating a gradient at another point.

    .. math:: \theta_t = (\theta_{t-1} - \eta_t u_t) / (1 + \eta_t \lambda)

    with :math:`u_t` of :func:`scale_by_adan`, and with `no_prox` :math:`\theta_t = \theta_{t-1} -
    \eta_t (u_t + \lambda \theta_{t-1})`.

    State: 16 bytes per parameter. Starting rates: 5 to 10 times AdamW's, the authors say.

    Args:
      learning_rate: a number or a schedule; the authors advise 5 to 10 times AdamW's.
      b1, b2, b3, eps, eps_root, restart_condition, mu_dtype, nu_dtype: as for :func:`scale_by_adan`.
      no_prox: decay as AdamW does.
      weight_decay: :math:`\lambda`; the authors' examples have 0.02.
      weight_decay_mask: which parameters decay, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    For the authors' ``max_grad_norm``, chain ``optax.clip_by_global_norm`` in front.

    Source: as :func:`scale_by_adan`.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx, params = ravine.adan(0.01, weight_decay=0.1), jnp.ones(1)
      >>> round(float((params + tx.update(jnp.array([0.1]), tx.init(params), params)[0])[0]), 5)
      0.98901
    """
    return with_decay(
        scale_by_adan(
            b1,
            b2,
            b3,
            eps,
            eps_root,
            restart_condition=restart_condition,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form="coupled" if no_prox else "proximal",
    )
