"""Estimates of the Hessian's diagonal: Gauss–Newton–Bartlett and Hutchinson.

An estimator is a function ``(params, key) -> tree like params``. It closes over the batch, so every
step makes a new one, and :func:`scale_by_sophia` calls it on some steps.

An optimizer of part of the parameters calls it with that part alone. `combine_by_role` and optimizers
with a fallback fill in the rest; in ``optax.masked`` and ``optax.partition``, give the estimator
``params=``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ...core.arguments import checked
from ...core.arithmetic import wide
from ...core.tree_checks import is_part

Curvature = Callable[[Any, jax.Array], Any]
"""From parameters and a random key to an estimate of the diagonal, a tree like the parameters."""


@checked
def gauss_newton_bartlett(
    logits_fn: Callable[[Any], jax.Array],
    *,
    params: optax.Params | None = None,
    where: jax.Array | None = None,
    axis_name: Any = None,
) -> Curvature:
    r"""Labels sampled from the model itself, and the square of their gradient (Sophia-G).

    .. math::
        \hat y_b \sim \operatorname{softmax}(\mathrm{logits}_b(\theta)), \qquad
        \hat h = B \, \Big( \nabla_\theta \tfrac{1}{B} \sum_b \ell_b(\hat y_b) \Big)^2

    an unbiased estimate of the diagonal of the Gauss–Newton matrix of the mean cross-entropy, never
    negative. B is the number of predictions.

    Args:
      logits_fn: from parameters to logits `[..., classes]` of the current batch.
      params: all parameters, for an optimizer of a part of them: the rest is held fixed.
      where: `[...]`, which predictions count; by default all.
      axis_name: under ``shard_map``, the mesh axes over which the batch is split: every device samples
        its own labels, and gradients are averaged over devices. Not needed under ``jit``.

    Source: Liu et al., 2023, https://arxiv.org/abs/2305.14342, algorithm 2; Liuhong99/Sophia,
    ``train_sophiag.py``.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> curvature = ravine.gauss_newton_bartlett(lambda params: inputs @ params)
      >>> curvature(jnp.zeros((2, 3)), jax.random.key(0)).shape
      (2, 3)
    """

    logits_of = _of_part(logits_fn, params)

    def estimate(params: Any, key: jax.Array) -> Any:
        params = _varying(params, axis_name)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def total_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = wide(logits_of(params))
            labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            counted = jnp.ones(losses.shape, bool) if where is None else where.astype(bool)
            return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted.astype(losses.dtype))

        grads, size = jax.grad(total_loss, has_aux=True)(params)
        if axis_name is not None:
            grads, size = jax.lax.psum((grads, size), axis_name)
        size = jnp.maximum(size, 1)
        return jax.tree.map(lambda g: jnp.square(wide(g)) / size.astype(wide(g).dtype), grads)

    return estimate


@checked
def hutchinson(
    loss_fn: Callable[[Any], jax.Array],
    *,
    params: optax.Params | None = None,
    samples: int = 1,
    axis_name: Any = None,
) -> Curvature:
    r"""Products of the Hessian with random signs (Sophia-H).

    .. math:: \hat h = \tfrac{1}{S} \sum_s r_s \odot H r_s, \qquad r_s \in \{-1, 1\}^n

    an unbiased estimate of the diagonal of H itself, which may be negative. For diagonal H one sample
    is exact.

    Args:
      loss_fn: from parameters to the mean loss of the current batch.
      params: all parameters, for an optimizer of a part of them: the rest is held fixed.
      samples: S.
      axis_name: under ``shard_map``, the mesh axes over which the batch is split: all devices use the
        same signs, and products are averaged. Not needed under ``jit``.

    Raises:
      ValueError: for fewer than one sample.

    Source: Hutchinson, 1989; Liu et al., 2023, https://arxiv.org/abs/2305.14342, algorithm 1.

    Example:
      >>> import jax, jax.numpy as jnp, ravine
      >>> curvature = ravine.hutchinson(lambda p: jnp.sum(jnp.array([1.0, 3.0]) * p**2))
      >>> curvature(jnp.zeros(2), jax.random.key(0))
      Array([2., 6.], dtype=float32)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}.")

    loss_of = _of_part(loss_fn, params)

    def once(params: Any, key: jax.Array) -> Any:
        signs = optax.tree.random_like(key, params, sampler=jax.random.rademacher)
        point, tangent = _varying((params, signs), axis_name)
        _, product = jax.jvp(jax.grad(loss_of), (point,), (tangent,))
        if axis_name is not None:
            product = jax.lax.pmean(product, axis_name)
        return jax.tree.map(lambda r, hr: wide(r) * wide(hr), signs, product)

    def estimate(params: Any, key: jax.Array) -> Any:
        found = jax.lax.map(lambda k: once(params, k), jax.random.split(key, samples))
        return jax.tree.map(lambda h: jnp.mean(h, axis=0), found)

    return estimate


def filled(part: Any, whole: Any) -> Any:
    """`part`, filled in from `whole` where `optax.masked` or `optax.partition` took leaves out."""
    is_taken = lambda node: isinstance(node, optax.MaskedNode)
    return jax.tree.map(
        lambda node, rest: rest if is_taken(node) else node, part, whole, is_leaf=is_taken
    )


def with_whole_curvature(extra: dict[str, Any], params: Any) -> dict[str, Any]:
    """Arguments for updates of parts of `params`, with a ``curvature`` that always gets all of them."""
    curvature = extra.get("curvature")
    if curvature is None or params is None:
        return extra
    return {**extra, "curvature": lambda part, key: curvature(filled(part, params), key)}


def _of_part(function: Callable[[Any], Any], whole: Any) -> Callable[[Any], Any]:
    """A function of all parameters, as a function of the part that `whole` completes."""

    def call(params: Any) -> Any:
        if whole is not None:
            return function(filled(params, whole))
        try:
            return function(params)
        except Exception as error:
            if not is_part(params):
                raise
            raise ValueError(
                "the optimizer has a part of the parameters, and the model needs all; give the "
                "estimator all of them, as in gauss_newton_bartlett(logits_fn, params=params)."
            ) from error

    return call


def _varying(tree: Any, axis_name: Any) -> Any:
    """`tree`, typed to keep gradients separate per device: JAX sums those of replicated arrays."""
    names = () if axis_name is None else axis_name
    names = names if isinstance(names, tuple) else (names,)

    def typed(x: jax.Array) -> jax.Array:
        varying = jax.typeof(x).manual_axis_type.varying
        missing = tuple(name for name in names if name not in varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(typed, tree)
