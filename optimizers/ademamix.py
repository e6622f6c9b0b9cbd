"""AdEMAMix: Adam with a second, much slower momentum."""

import math
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
    root,
    scalar,
    wide_dtype,
    wide_zeros_like,
    widest,
)
from ..core.checks import check_decay_rates, check_non_negative, check_some_eps
from ..core.transformation import transformation
from .links.decay import DecayForm, Mask, with_decay


class ScaleByAdemamixState(NamedTuple):
    """State of `scale_by_ademamix`."""

    count: jax.Array  # int32 scalar, updates made so far
    mu: optax.Updates  # like params, mu_dtype: fast mean of gradients
    slow: optax.Updates  # like params, mu_dtype: slow mean of gradients
    nu: optax.Updates  # like params, nu_dtype: mean of squared gradients


@checked
def scale_by_ademamix(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 2.0,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    alpha_warmup: int | None = None,
    b3_warmup: int | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Two momenta, fast and slow, over a root mean square.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_3 s_{t-1} + (1 - \beta_3) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t) + \alpha s_t}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon_\mathrm{root}} + \epsilon}

    The slow momentum is not corrected for its start. During warm-up :math:`\alpha` grows linearly from
    0, and :math:`\beta_3` from :math:`\beta_1` so that its half-life grows linearly. The first update
    is number 1 of the warm-up, as in the authors' PyTorch file; their Optax file counts from 0.

    Args:
      b1: :math:`\beta_1` in [0, 1).
      b2: :math:`\beta_2` in [0, 1).
      b3: :math:`\beta_3` in [0, 1), of the slow momentum.
      alpha: weight of the slow momentum, not negative. 2 is the PyTorch file's, 5 to 10 are the
        paper's for language models.
      eps: added outside the root.
      eps_root: added inside the root.
      alpha_warmup: updates over which alpha grows; None for no warm-up.
      b3_warmup: updates over which b3 grows; None for no warm-up. The paper sets both to the whole run.
      mu_dtype: dtype of both momenta; by default at least float32. In bfloat16 the slow one stalls.
      nu_dtype: dtype of the second moment; by default at least float32.

    Raises:
      ValueError: for values out of range, or when both epsilons are zero.

    Source: Pagliardini et al., 2024, https://arxiv.org/abs/2409.03137; apple/ml-ademamix,
    ``pytorch/ademamix.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.scale_by_ademamix(alpha=5.0)
      >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0].round(4)
      Array([1.0005], dtype=float32)
    """
    check_decay_rates(b1=b1, b2=b2, b3=b3)
    check_non_negative(alpha=alpha, alpha_warmup=alpha_warmup or 0, b3_warmup=b3_warmup or 0)
    check_some_eps(eps, eps_root)

    def init(params: optax.Params) -> ScaleByAdemamixState:
        return ScaleByAdemamixState(
            count=jnp.zeros([], jnp.int32),
            mu=wide_zeros_like(params, mu_dtype),
            slow=wide_zeros_like(params, mu_dtype),
            nu=wide_zeros_like(params, nu_dtype),
        )

    def update(
        updates: optax.Updates, state: ScaleByAdemamixState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdemamixState]:
        del params
        count = increment(state.count)
        mu = ema(updates, state.mu, b1)
        nu = ema(updates, state.nu, b2, jax.lax.square)
        keep, take = _slow_decay(b1, b3, b3_warmup, count)
        weight = _warmed_up(alpha, alpha_warmup, count)
        of_m, of_v = bias_correction(b1, count), bias_correction(b2, count)

        def slower(g: jax.Array, s: jax.Array) -> jax.Array:
            dtype = wide_dtype(g.dtype, s.dtype)
            return scalar(keep, dtype) * cast(s, dtype) + scalar(take, dtype) * cast(g, dtype)

        def direction(g: jax.Array, m: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
            mixed = m / cast(of_m, m.dtype) + scalar(weight, m.dtype) * cast(s, m.dtype)
            below = root(v / cast(of_v, v.dtype), eps, eps_root)
            return cast(mixed / cast(below, m.dtype), g.dtype)

        slow = jax.tree.map(slower, updates, state.slow)
        directions = jax.tree.map(direction, updates, mu, slow, nu)
        moments = zip((mu, slow, nu), state[1:], strict=True)
        return directions, ScaleByAdemamixState(count, *(cast_like(x, like) for x, like in moments))

    return transformation(init, update)


def _warmed_up(alpha: Any, steps: int | None, count: jax.Array) -> Any:
    if not steps:
        return alpha
    dtype = widest()
    return jnp.asarray(alpha, dtype) * jnp.minimum(count.astype(dtype) / steps, 1)


def _slow_decay(b1: Any, b3: Any, steps: int | None, count: jax.Array) -> tuple[Any, Any]:
    """The decay rate of the slow momentum and one minus it, each to full precision."""
    if not steps:
        return b3, 1 - b3
    dtype = widest()
    half_lives = [math.log(0.5) / _log(b + 1e-8) - 1 for b in (b1, b3)]
    done = jnp.minimum(count.astype(dtype) / steps, 1)
    log_keep = math.log(0.5) / ((1 - done) * half_lives[0] + done * half_lives[1] + 1)
    # The 1e-8 above is the authors'; it has no effect after the warm-up.
    over = done == 1
    keep = jnp.where(over, jnp.asarray(b3, dtype), jnp.exp(log_keep))
    return keep, jnp.where(over, jnp.asarray(1 - b3, dtype), -jnp.expm1(log_keep))


def _log(decay: Any) -> Any:
    return math.log(decay) if isinstance(decay, (int, float)) else jnp.log1p(decay - 1)


@checked
def ademamix(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 2.0,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    alpha_warmup: int | None = None,
    b3_warmup: int | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""AdEMAMix with decoupled weight decay: AdamW with a second, very slow momentum.

    For long runs, in which gradients from thousands of steps ago still help. Warm up `alpha` and `b3`
    over the run.

    .. math:: \theta_t = \theta_{t-1} - \eta_t \, (u_t + \lambda \theta_{t-1})

    with :math:`u_t` of :func:`scale_by_ademamix`.

    State: 12 bytes per parameter. Starting rates: AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, b3, alpha, eps, eps_root, alpha_warmup, b3_warmup, mu_dtype, nu_dtype: as for
        :func:`scale_by_ademamix`.
      weight_decay: :math:`\lambda`, by default multiplied by the learning rate.
      weight_decay_mask, weight_decay_form: which decay and how, see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`scale_by_ademamix`.

    Example:
      >>> import ravine
      >>> tx = ravine.ademamix(1e-3, alpha=8.0, alpha_warmup=10_000, b3_warmup=10_000)
    """
    return with_decay(
        scale_by_ademamix(
            b1,
            b2,
            b3,
            alpha,
            eps,
            eps_root,
            alpha_warmup=alpha_warmup,
            b3_warmup=b3_warmup,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
