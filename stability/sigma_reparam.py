r"""σ-reparametrisation: every matrix is a learned gain times a matrix of spectral norm one.

.. math:: \hat W = \frac{\gamma}{\sigma(W)} W

A bound on the gain bounds the matrix, and with it the entropy of attention from below. What is
trained is the tree of `SigmaWeights`; the model computes with `sigma_weights` of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.arithmetic import wide

PRECISION = jax.lax.Precision.HIGHEST


class SigmaWeights(NamedTuple):
    """The trained form of one matrix `[..., in, out]`."""

    matrix: jax.Array
    gain: jax.Array  # [...], float32


class SigmaState(NamedTuple):
    """The state of power iteration for one matrix."""

    right: jax.Array  # [..., out], float32: near the first right singular vector


def sigma_reparam(weights: Any) -> tuple[Any, Any]:
    """Matrices in their trained form, with the same product; gains and states are found by SVD.

    Args:
      weights: a tree of matrices `[..., in, out]`.

    Returns:
      A tree with `SigmaWeights`, and one with `SigmaState`, in the place of each matrix.

    Raises:
      ValueError: for a leaf of less than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import sigma_reparam
      >>> trained, state = sigma_reparam(jnp.array([[3.0, 0.0], [0.0, 1.0]]))
      >>> float(trained.gain)
      3.0
    """

    def one(path: Any, w: jax.Array) -> tuple[SigmaWeights, SigmaState]:
        if w.ndim < 2:
            raise ValueError(
                f"{jax.tree_util.keystr(path) or 'the leaf'} has shape {w.shape}, but sigma_reparam "
                "takes matrices [..., in, out]; leave it out."
            )
        _, values, right = jnp.linalg.svd(wide(w), full_matrices=False)
        return SigmaWeights(w, values[..., 0]), SigmaState(right[..., 0, :])

    pairs = jax.tree_util.tree_map_with_path(one, weights)
    is_pair = lambda node: isinstance(node, tuple) and isinstance(node[0], SigmaWeights)
    return tuple(jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in (0, 1))


def sigma_weights(trained: Any, state: Any) -> tuple[Any, Any]:
    """The matrices to compute with, and the state after one more step of power iteration.

    Singular vectors are held fixed in the gradient, which is then that of the paper. The arithmetic is
    float32, and matrices come back in their dtype.

    Args:
      trained: a tree with `SigmaWeights`.
      state: the tree of `SigmaState` that goes with it; keep the new one for the next training step.

    Source: Zhai et al., 2023, https://arxiv.org/abs/2303.06296; apple/ml-sigma-reparam,
    ``vision/layers.py``.

    Example:
      >>> import jax.numpy as jnp
      >>> from ravine.stability import sigma_reparam, sigma_weights
      >>> trained, state = sigma_reparam(jnp.array([[3.0, 0.0], [0.0, 1.0]]))
      >>> doubled = trained._replace(matrix=2 * trained.matrix)  # the size of the matrix is void
      >>> weights, state = sigma_weights(doubled, state)
      >>> weights
      Array([[3., 0.],
             [0., 1.]], dtype=float32)
    """

    def one(w: SigmaWeights, s: SigmaState) -> tuple[jax.Array, SigmaState]:
        matrix = wide(w.matrix)
        fixed = jax.lax.stop_gradient(matrix)
        left = _unit(_times(fixed, s.right.astype(matrix.dtype)))
        right = _unit(_times(jnp.swapaxes(fixed, -1, -2), left))
        sigma = jnp.sum(left * _times(matrix, right), axis=-1)
        factor = w.gain.astype(matrix.dtype) / jnp.where(sigma > 0, sigma, 1)
        new = SigmaState(jax.lax.stop_gradient(right).astype(s.right.dtype))
        return (matrix * factor[..., None, None]).astype(w.matrix.dtype), new

    is_weights = lambda node: isinstance(node, SigmaWeights)
    pairs = jax.tree.map(one, trained, state, is_leaf=is_weights)
    is_pair = lambda node: isinstance(node, tuple) and isinstance(node[-1], SigmaState)
    return tuple(jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in (0, 1))


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.einsum("...mn,...n->...m", matrix, vector, precision=PRECISION)


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
