r"""QK-clip: heads whose attention logits have grown too large have their weights scaled down.

With the largest logit :math:`S_h` of head h in the current step, :math:`\gamma_h = \tau / \max(S_h,
\tau)` is the factor that its logits need. The factor is split between the weights of
queries and keys:

==================================  ===================================================  ===============
weights                             factor                                               in MLA
==================================  ===================================================  ===============
key head g, of the query heads g    :math:`\kappa_g = (\max_{h \in g} \gamma_h)^{1/2}`   :math:`k^C`
query head h of that key head       :math:`\gamma_h / \kappa_g`                          :math:`q^C`
query part whose key all share      :math:`\gamma_h`                                     :math:`q^R`
key part that all heads share       1                                                    :math:`k^R`
==================================  ===================================================  ===============

With as many key heads as query heads both factors are :math:`\sqrt{\gamma_h}`, the rule of Kimi K2.
Where query heads share a key, every head still has its logits multiplied with exactly its own
factor, none grows, and a key that a head within bounds looks at is not touched.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..core.arguments import checked
from ..core.arithmetic import wide
from ..core.checks import check_positive
from ..core.paths import path_string
from ..core.transformation import with_extra_args
from ..core.tree_checks import check_params_given
from ._checks import check_extra_given

Part = Literal["own", "shared", "fixed"]


@checked
class HeadWeights(NamedTuple):
    """Where the heads are in a parameter that makes queries or keys.

    Example:
      >>> from ravine.stability import HeadWeights
      >>> HeadWeights("query", heads=16, parts=(("own", 128), ("shared", 64)))  # MLA's [rank, 16 * 192]
      HeadWeights(kind='query', heads=16, parts=(('own', 128), ('shared', 64)), axis=-1)
    """

    kind: Literal["query", "key"]
    heads: int
    """Query heads, or key heads."""
    parts: tuple[tuple[Part, int], ...] = ()
    """What the coordinates of one head are, with their widths, in order: ``own``, those whose key is
    the head's or its group's; ``shared``, queries whose key all heads share; ``fixed``, what is no
    query or key, as the values in MLA's joint projection. Empty: all are own."""
    axis: int = -1
    """The axis of the heads: of size `heads`, followed by that of the coordinates, or of both joined."""


@checked
def qk_clip(
    threshold: float, weights: Mapping[str, HeadWeights]
) -> optax.GradientTransformationExtraArgs:
    r"""Last in a chain: bends the update so that no head's largest logit stays beyond :math:`\tau`.

    The parameters end at the factor of the table times where the update would have taken them. The
    update takes ``max_logits=``, the largest logits of the current step before any soft-cap, as
    :func:`ravine.stability.attention` gives them:

    * `[H]`, or `[L, H]` for layers that are stacked at axis 0 of the parameters, one for all
      patterns; or
    * a mapping of such, from the text that the group ``(...)`` of the pattern matched in the path.

    Heads without a finite largest logit are left alone. It is at odds with QK-norm, under which
    logits do not depend on the size of these weights; biases of queries and keys need entries of
    their own.

    Args:
      threshold: :math:`\tau`; 100 in Kimi K2.
      weights: from regular expressions, searched in the paths of parameters, to where heads are.

    Raises:
      ValueError: for a threshold that is not positive; at `init` for a pattern that finds nothing, or a
        parameter of another shape than its heads; at the update without logits or parameters, or with
        logits of another shape.

    Source: Kimi K2, 2025, https://arxiv.org/abs/2507.20534, algorithm 1 (MHA and MLA; the rule for
      shared keys of GQA is ours).

    Example:
      >>> import jax.numpy as jnp, optax, ravine
      >>> from ravine.stability import HeadWeights, qk_clip
      >>> clip = qk_clip(100.0, {"q$": HeadWeights("query", 2), "k$": HeadWeights("key", 2)})
      >>> tx, params = optax.chain(ravine.sgd(0.1), clip), {"q": jnp.ones((1, 4)), "k": jnp.ones((1, 4))}
      >>> grads = {"q": jnp.zeros((1, 4)), "k": jnp.zeros((1, 4))}
      >>> logits = jnp.array([400.0, 7.0])
      >>> updates, _ = tx.update(grads, tx.init(params), params, max_logits=logits)
      >>> params["q"] + updates["q"]
      Array([[0.5, 0.5, 1. , 1. ]], dtype=float32)
    """
    check_positive(threshold=threshold)
    groups = _groups(weights)

    def match(name: str) -> tuple[HeadWeights, str] | None:
        for pattern, where in weights.items():
            if found := re.search(pattern, name):
                return where, found.group(1) if found.re.groups else ""
        return None

    def init(params: optax.Params) -> optax.EmptyState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for pattern in weights:
            if not any(re.search(pattern, path_string(path)) for path, _ in leaves):
                raise ValueError(
                    f"no parameter's path has {pattern!r}; correct the pattern of qk_clip."
                )
        for path, leaf in leaves:
            if found := match(path_string(path)):
                _widths(found[0], leaf.shape, path_string(path))
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        max_logits: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra
        check_params_given(params, "qk_clip")
        check_extra_given(max_logits, "max_logits", "qk_clip")

        def bent(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            name = path_string(path)
            found = match(name)
            if found is None:
                return u
            where, key = found
            logits = max_logits[key] if isinstance(max_logits, Mapping) else max_logits
            factor = _factor(where, groups, threshold, jnp.asarray(logits), p.shape, name)
            target = (wide(p) + wide(u).astype(wide(p).dtype)) * factor
            changed = (target - wide(p)).astype(u.dtype)
            return jnp.where(factor == 1, u, changed)

        return jax.tree_util.tree_map_with_path(bent, updates, params), state

    return with_extra_args(init, update)


def _groups(weights: Mapping[str, HeadWeights]) -> tuple[int, int]:
    """Query heads and key heads, the same in all entries."""
    kinds = {
        kind: {w.heads for w in weights.values() if w.kind == kind} for kind in ("query", "key")
    }
    if len(kinds["query"]) != 1 or len(kinds["key"]) > 1:
        raise ValueError(
            "qk_clip needs weights of queries, all with as many heads, and as many key heads in all "
            f"weights of keys; got {sorted(kinds['query'])} and {sorted(kinds['key'])}."
        )
    (queries,) = kinds["query"]
    keys = next(iter(kinds["key"]), queries)
    if min(keys, queries) < 1 or queries % keys:
        raise ValueError(
            f"the number of key heads, {keys}, must divide that of query heads, {queries}."
        )
    return queries, keys


def _widths(where: HeadWeights, shape: tuple[int, ...], name: str) -> tuple[int, bool]:
    """Coordinates of a head, and whether heads have an axis of their own."""
    given = sum(width for _, width in where.parts)
    axis = where.axis % max(len(shape), 1)
    apart = len(shape) > axis + 1 and shape[axis] == where.heads
    if apart and given in (0, shape[axis + 1]):
        return shape[axis + 1], True
    if shape and shape[axis] % where.heads == 0 and given in (0, shape[axis] // where.heads):
        return shape[axis] // where.heads, False
    raise ValueError(
        f"{name} has shape {shape}, whose axis {where.axis} is not {where.heads} heads"
        f"{f' of {given} coordinates' if given else ''}; correct its HeadWeights."
    )


def _factor(
    where: HeadWeights,
    groups: tuple[int, int],
    threshold: float,
    logits: jax.Array,
    shape: tuple[int, ...],
    name: str,
) -> jax.Array:
    """The factor of the parameter, broadcast to it."""
    queries, keys = groups
    width, apart = _widths(where, shape, name)
    stacked = logits.ndim == 2
    if logits.shape[-1:] != (queries,) or logits.ndim > 2 or (stacked and shape[0] != len(logits)):
        raise ValueError(
            f"max_logits of {name} must be [{queries}], or [{shape[0]}, {queries}] if its first axis "
            f"counts layers, got {logits.shape}."
        )
    logits = wide(logits)
    # A head without a finite logit is left alone.
    logits = jnp.where(jnp.isfinite(logits), logits, threshold)
    gamma = threshold / jnp.maximum(logits, threshold)
    grouped = gamma.reshape(*gamma.shape[:-1], keys, queries // keys)
    kappa = jnp.sqrt(jnp.max(grouped, axis=-1))
    if where.kind == "key":
        own, shared = kappa, jnp.ones_like(kappa)
    else:
        own, shared = (grouped / kappa[..., None]).reshape(gamma.shape), gamma
    factors = {"own": own, "shared": shared, "fixed": jnp.ones_like(own)}
    pieces = [
        jnp.repeat(factors[part][..., None], size, axis=-1)
        for part, size in where.parts or (("own", width),)
    ]
    each = jnp.concatenate(pieces, axis=-1)  # [(L,) heads, width]
    axis = where.axis % len(shape)
    inside = each.shape[-2:] if apart else (each.shape[-2] * each.shape[-1],)
    full = [1] * len(shape)
    full[axis : axis + len(inside)] = inside
    if stacked:
        full[0] = len(logits)
    return each.reshape(full)
