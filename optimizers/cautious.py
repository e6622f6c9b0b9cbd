"""Cautious optimizers: only coordinates where the update agrees with the current gradient move."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import cast, wide, wide_dtype
from ..core.transformation import with_extra_args
from .adam import scale_by_adam
from .links.decay import DecayForm, Mask, with_decay
from .lion import scale_by_lion

Rescale = Literal["clamped", "smoothed"]


@checked
def cautious(
    direction: optax.GradientTransformation, *, rescale: Rescale = "clamped"
) -> optax.GradientTransformationExtraArgs:
    r"""Any direction, with coordinates set to zero where its sign differs from the gradient's.

    .. math::
        u_t \leftarrow \frac{[u_t g_t > 0]}{\max(s, 10^{-3})} \, u_t, \qquad
        s = \operatorname{mean} [u_t g_t > 0]

    with the mean over each leaf, so that the leaf keeps its step size. NaN stays NaN, and signs are
    compared instead of products, which could underflow.

    Args:
      direction: neither negated nor scaled, such as :func:`scale_by_adam`; it comes before decay and
        learning rate.
      rescale: ``"clamped"`` is the formula above, the authors' C-AdamW; ``"smoothed"`` divides by
        :math:`s + 1/n` for a leaf of n coordinates, their C-Lion.

    Raises:
      ValueError: for an unknown rescale.

    Source: Liang et al., 2024, https://arxiv.org/abs/2411.16085; kyleliang919/C-Optim, ``c_adamw.py``
    (the loop over parameters) and ``c_lion.py``.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.cautious(ravine.scale_by_momentum(0.9))
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 1.0]), state)
      >>> tx.update(jnp.array([1.0, -0.5]), state)[0]
      Array([3.8, 0. ], dtype=float32)
    """
    inner = optax.with_extra_args_support(direction)

    def agreeing(u: jax.Array, g: jax.Array) -> jax.Array:
        dtype = wide_dtype(u.dtype, g.dtype)
        against = jnp.sign(cast(u, dtype)) * jnp.sign(cast(g, dtype)) <= 0
        if not u.size:
            return u
        share = jnp.mean(jnp.where(against, 0, 1).astype(dtype))
        by = jnp.maximum(share, 1e-3) if rescale == "clamped" else share + 1 / u.size
        return cast(jnp.where(against, 0, wide(u)) / by.astype(wide(u).dtype), u.dtype)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        found, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(agreeing, found, updates), state

    return with_extra_args(inner.init, update)


@checked
def cautious_adamw(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""C-AdamW: AdamW with a :func:`cautious` direction.

    A drop-in to try on a tuned run: coordinates that disagree with the gradient do not move. The
    authors' file has eps 1e-6, not corrected for the start: :math:`\epsilon / \sqrt{1 - \beta_2^t}` in
    Adam's terms.

    State: 8 bytes per parameter. Starting rates: AdamW's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, mu_dtype, nu_dtype: as for :func:`scale_by_adam`.
      weight_decay, weight_decay_mask, weight_decay_form: see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`cautious`.

    Example:
      >>> import ravine
      >>> tx = ravine.cautious_adamw(3e-4, b2=0.95, weight_decay=0.1)
    """
    return with_decay(
        cautious(scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype)),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )


@checked
def cautious_lion(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.95,
    b2: float = 0.98,
    *,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Mask | None = None,
    weight_decay_form: DecayForm = "coupled",
) -> optax.GradientTransformation:
    r"""C-Lion: Lion with a :func:`cautious` direction, and the authors' decay rates.

    A drop-in to try where Lion works.

    State: 4 bytes per parameter. Starting rates: Lion's.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, mu_dtype: as for :func:`scale_by_lion`.
      weight_decay, weight_decay_mask, weight_decay_form: see :func:`add_decayed_weights`.

    Returns:
      An ``optax.GradientTransformation``; its update needs ``params`` where there is weight decay.

    Raises:
      ValueError: for hyperparameters out of range.

    Source: as :func:`cautious`.

    Example:
      >>> import ravine
      >>> tx = ravine.cautious_lion(1e-4, weight_decay=0.1)
    """
    return with_decay(
        cautious(scale_by_lion(b1, b2, mu_dtype=mu_dtype), rescale="smoothed"),
        learning_rate,
        weight_decay,
        weight_decay_mask,
        form=weight_decay_form,
    )
