r"""Arithmetic shared by the element-wise optimizers.

Moments are computed and, by default, stored in at least float32, whatever the parameters are: a
bfloat16 second moment with :math:`\beta_2 = 0.999` stops moving, because each increment is below
half a unit in its last place. Coefficients such as :math:`1 - \beta` and :math:`1 - \beta^t` are
formed in Python's double precision where the decay rate is a Python number; in float32
:math:`1 - 0.999` is already off by 5e-5.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .tree_checks import check_real_leaves


@functools.cache
def wide_dtype(*dtypes: Any) -> Any:
    """The widest of `dtypes` and float32, the dtype in which arithmetic is done.

    `jnp.promote_types` gives the same result, but raises under strict dtype promotion.
    """
    is_double = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def widest() -> Any:
    """The dtype of scalars: float64 where it is enabled, else float32."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`. An array that has it already is returned without being traced, the usual case."""
    return x if x.dtype == dtype else x.astype(dtype)


def wide(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return cast(x, wide_dtype(x.dtype))


def scalar(value: Any, dtype: Any) -> Any:
    """A hyperparameter to multiply arrays of `dtype` with: a number as it is, an array cast."""
    return value if isinstance(value, (int, float)) else jnp.asarray(value, dtype)


def wide_zeros_like(params: optax.Params, dtype: Any = None) -> optax.Updates:
    """Zeros shaped like `params`, in `dtype` or, by default, at least float32."""
    check_real_leaves(params)
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype or wide_dtype(p.dtype)), params)


def cast_like(tree: Any, target: Any) -> Any:
    """Each leaf of `tree` in the dtype of the matching leaf of `target`."""
    return jax.tree.map(lambda x, t: cast(x, t.dtype), tree, target)


def lerp(new: jax.Array, old: jax.Array, decay: Any) -> jax.Array:
    r""":math:`\beta\,\mathrm{old} + (1 - \beta)\,\mathrm{new}` in the wider dtype of the two."""
    dtype = wide_dtype(old.dtype, new.dtype)
    keep, take = (scalar(c, dtype) for c in (decay, 1 - decay))
    return keep * cast(old, dtype) + take * cast(new, dtype)


def ema(
    values: Any, moments: Any, decay: Any, power: Callable[[jax.Array], jax.Array] = lambda x: x
) -> Any:
    """Exponential moving average of `power(value)`, unrounded: store it with `cast_like`."""
    return jax.tree.map(lambda v, m: lerp(power(wide(v)), m, decay), values, moments)


def traces(matrices: Any) -> Any:
    """The traces of matrices `[..., n, n]`, a tree.

    `jnp.trace` masks whole matrices, which takes XLA for CPU a hundred times as long.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.core.arithmetic import traces
      >>> traces(jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      Array(5., dtype=float32)
    """
    of = lambda x: jnp.sum(jnp.diagonal(x, axis1=-2, axis2=-1), axis=-1)
    return jax.tree.map(of, matrices)


def is_summable(squares: Any) -> Any:
    """Whether sums of squares, a tree, are finite, with a margin for rounding.

    The one rule for what may enter a moment: in float32, norms up to 1.3e19. Non-finite values break
    it, and so do finite values whose squares overflow: they would make a second moment infinite, and
    every later step zero.
    """
    return jax.tree.map(lambda x: jnp.isfinite(2 * x), squares)


def has_summable_trace(matrices: Any) -> Any:
    """Whether positive semi-definite matrices `[..., n, n]`, a tree, are finite, with that margin.

    None of their elements is larger than the trace.
    """
    return is_summable(traces(matrices))


def is_usable(
    x: jax.Array, axes: tuple[int, ...] | None = None, summed: tuple[str, ...] = ()
) -> jax.Array:
    """Whether the squares of an array can be summed: by default a boolean scalar.

    Args:
      x: an array.
      axes: the axes summed over; None for all.
      summed: mesh axes that cut the array along these axes, inside `jax.shard_map`.
    """
    return is_summable(jax.lax.psum(jnp.sum(jnp.square(wide(x)), axis=axes), summed))


def sign(x: jax.Array) -> jax.Array:
    """The sign, but infinity stays infinite: an overflow must not look like an ordinary step."""
    return jnp.where(jnp.isfinite(x), jax.lax.sign(x), x)


def increment(count: jax.Array) -> jax.Array:
    """`count + 1`, staying at the largest int32."""
    return jnp.asarray(optax.safe_increment(count))


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t`, accurate for :math:`\beta` near one.

    Written as :math:`-\operatorname{expm1}(t \log\beta)`, which loses no digits to the subtraction.
    """
    dtype = widest()
    if isinstance(decay, (int, float)) and decay == 0:
        return jnp.ones([], dtype)

    log_decay = math.log(decay) if isinstance(decay, (int, float)) else jnp.log(decay.astype(dtype))
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(log_decay, dtype))


def momentum(
    updates: Any, mu: Any, b1: Any, count: jax.Array, *, nesterov: bool = False
) -> tuple[Any, Any]:
    r"""The moving average :math:`m_t` of updates, unrounded, and the mean that it stands for.

    The mean is :math:`m_t / (1 - \beta_1^t)`, or, with Nesterov's look-ahead, that of one step later.

    Args:
      updates: the gradients :math:`g_t`.
      mu: their moving average so far.
      b1: its decay rate.
      count: t, from one on.
      nesterov: :math:`\beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)`.
    """
    mu = ema(updates, mu, b1)
    weight = bias_correction(b1, count)
    if not nesterov:
        return mu, jax.tree.map(lambda m: m / cast(weight, m.dtype), mu)
    ahead = bias_correction(b1, increment(count))

    def mean(g: jax.Array, m: jax.Array) -> jax.Array:
        g = wide(g)
        return lerp(g / cast(weight, g.dtype), m / cast(ahead, m.dtype), b1)

    return mu, jax.tree.map(mean, updates, mu)


def over_root(
    means: Any, squares: Any, decay: Any, count: jax.Array, eps: Any, eps_root: Any = 0.0
) -> Any:
    r""":math:`m / (\sqrt{v / (1 - \beta^t) + \epsilon_\mathrm{root}} + \epsilon)`: Adam's step.

    Args:
      means: m, a tree.
      squares: v, likewise.
      decay: :math:`\beta`, the decay rate of v; None for a v that needs no correction.
      count: t, from one on.
      eps: added to the root.
      eps_root: added inside of it.
    """
    weight = None if decay is None else bias_correction(decay, count)

    def one(m: jax.Array, v: jax.Array) -> jax.Array:
        v = v if weight is None else v / cast(weight, v.dtype)
        return m / cast(root(v, eps, eps_root), m.dtype)

    return jax.tree.map(one, means, squares)


def root(x: jax.Array, eps: Any, eps_root: Any) -> jax.Array:
    r""":math:`\sqrt{x + \epsilon_\mathrm{root}} + \epsilon`, what second moments divide by."""
    inside = x if isinstance(eps_root, float) and eps_root == 0 else x + scalar(eps_root, x.dtype)
    return jax.lax.sqrt(inside) + scalar(eps, x.dtype)
