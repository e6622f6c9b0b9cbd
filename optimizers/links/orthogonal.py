"""The orthogonalizing step of Muon, as a transformation of its own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from ...core.arguments import checked
from ...core.checks import check_amount, check_known
from ...core.own_norm import NoOwnNorm, OwnNorm, with_norm
from ...core.transformation import transformation
from ..matrix.algebra.polar import NewtonSchulz
from ..matrix.batch.batches import map_matrices
from ..matrix.mesh.exchange import per_shard
from ..matrix.mesh.explicit import on_mixed_meshes
from ..matrix.shape.matrices import DEFAULT_AXES, Axes, Matrices, matrices_of, no_state


@checked
def orthogonalize(
    polar: Callable[[jax.Array], jax.Array] | None = None,
    *,
    axes: Axes = DEFAULT_AXES,
    max_elements: int | None = None,
) -> optax.GradientTransformation:
    r"""Replaces every matrix by (an approximation of) its polar factor.

    .. math:: G = U \Sigma V^\top \; \mapsto \; U V^\top

    All leaves must be matrices; route others to another optimizer with ``optax.partition`` or
    :func:`ravine.muon`. Matrices of the same shape, from whichever leaf, are processed together.

    Args:
      polar: maps a batch ``[K, m, n]``, m <= n, to its polar factors; by default
        ``NewtonSchulz()``: five of Keller Jordan's steps, in bfloat16 on GPU and TPU.
      axes: which axes of a leaf are rows and columns; by default the last two, ``[..., in, out]``.
      max_elements: bound on the elements processed at once, and so on temporary memory; ``None``
        takes 2**19 on CPU and 2**25 elsewhere.

    Raises:
      ValueError: for `max_elements` below one, and at `init` or the update for a leaf that is not a
        matrix, with its path and shape.

    Source: Jordan, 2024, https://kellerjordan.github.io/posts/muon/.

    Example:
      >>> import jax.numpy as jnp, ravine
      >>> tx = ravine.orthogonalize()
      >>> updates, _ = tx.update(jnp.diag(jnp.array([3e-5, 4e-5])), tx.init(jnp.zeros((2, 2))))
      >>> [round(float(x), 2) for x in jnp.diag(updates)]
      [0.72, 1.12]
    """
    check_known(max_elements=max_elements)
    check_amount(1, max_elements=max_elements)
    chosen = NewtonSchulz() if polar is None else polar

    def body(
        updates: optax.Updates, state: optax.EmptyState, found: Sequence[Matrices]
    ) -> tuple[optax.Updates, optax.EmptyState]:
        leaves, structure = jax.tree.flatten(updates)
        pieces = [each.opened(leaf) for each, leaf in zip(found, leaves, strict=True)]
        names = [each.names for each, leaf in zip(found, pieces, strict=True) for _ in leaf]
        sizes = next((each.sizes for each in found if each.sizes), {})
        flat = [piece for leaf in pieces for piece in leaf]
        done = iter(map_matrices(chosen, flat, max_elements, names=names, sizes=sizes))
        closed = [
            each.closed([next(done) for _ in leaf])
            for each, leaf in zip(found, pieces, strict=True)
        ]
        return jax.tree.unflatten(structure, closed), state

    on_shards = per_shard(
        body, lambda updates: optax.EmptyState(), functools.partial(matrices_of, axes=axes)
    )

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return on_shards(updates, state)

    def describe(params: optax.Params) -> dict[str, str]:
        del params
        return {"how": f"polar factor by {getattr(chosen, '__name__', type(chosen).__name__)}"}

    def no_norm(grads: Any, state: Any) -> dict[str, OwnNorm]:
        raise NoOwnNorm(
            "orthogonalize has no norm of its own: it does not know the momentum it is given, as "
            "scale_by_muon does."
        )

    return with_norm(
        transformation(on_mixed_meshes(no_state(axes)), update, describe), "orthogonalize", no_norm
    )
