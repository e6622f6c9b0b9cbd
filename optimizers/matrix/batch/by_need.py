"""Which matrices need a refresh, and how only these are refreshed.

A few products measure how badly a root or a basis fits its statistics; a new one costs tens of them. So
of the matrices that are due by the clock, those that still fit may be skipped.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ....core.arithmetic import wide_dtype
from ....core.once import once
from ....core.platform import platform
from .batches import part_of
from .refresh import Need
from .together import Unit, worked_on

AT_ONCE = {"cpu": 1}
"""How many matrices are refreshed at once, by platform; `AT_ONCE_ELSEWHERE` on all others. On CPU,
LAPACK processes them one by one anyway; elsewhere they share kernels, at the price of a few needless
refreshes."""
AT_ONCE_ELSEWHERE = 8


def in_need(
    units: Sequence[Unit], carries: Sequence[Any], need: Need, max_elements: int
) -> list[jax.Array]:
    """Which members of like units with these carries are to be refreshed: flags `[B]`.

    Only units that the same mesh axes cut are ranked against each other: devices that repeat a unit
    would otherwise rank it against different others, and their copies would drift apart.
    """
    found = misfits(units, carries, need, max_elements)
    flags = list(found)
    for cut in {unit.spread.cut: None for unit in units}:
        members = [at for at, unit in enumerate(units) if unit.spread.cut == cut]
        chosen = worst(jnp.concatenate([found[at] for at in members]), need)
        ends = itertools.accumulate(units[at].blocks for at in members)
        for at, end in zip(members, ends, strict=True):
            flags[at] = chosen[end - units[at].blocks : end]
    return flags


def misfits(
    units: Sequence[Unit], carries: Sequence[Any], need: Need, max_elements: int
) -> list[jax.Array]:
    """How badly these carries fit the sources of like units: `[B]` each."""
    asked = [
        unit._replace(source=(carry, unit.source), carry=jnp.zeros(unit.blocks, misfit_dtype(unit)))
        for unit, carry in zip(units, carries, strict=True)
    ]

    def ask(kind: Any, old: jax.Array, source: Any) -> jax.Array:
        return need.misfit(kind, *source).astype(old.dtype)

    return worked_on(asked, ask, max_elements)


def misfit_dtype(unit: Unit) -> Any:
    """The dtype of a unit's misfits."""
    leaves = jax.tree.leaves(unit.source)
    floats = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return wide_dtype(floats[0])


def worst(found: jax.Array, need: Need, due: jax.Array | None = None) -> jax.Array:
    """Which of these misfits `[B]`, or of those that are due, are in need and within the bound.

    A non-finite misfit is in need too, but after all others: a refresh may not help.
    """
    wanted = ~(found <= need.above) | need.every
    wanted = wanted if due is None else due & wanted
    if need.most == 1:
        return wanted
    key = jnp.where(wanted, jnp.where(jnp.isfinite(found), -found, 0), jnp.inf)
    rank = jnp.argsort(jnp.argsort(key))
    most = [math.ceil(round(need.most * n, 6)) for n in range(found.size + 1)]
    bound = most[-1] if due is None else jnp.asarray(most)[jnp.sum(due)]
    return wanted & (~jnp.asarray(need.bounded) | (rank < bound))


def only_those(
    function: Callable[[Hashable, Any, Any], Any],
) -> Callable[[Hashable, Any, Any], Any]:
    """`function` of those members of a batch that are flagged; sources are pairs with the flags."""

    def applied(kind: Any, carry: Any, source: Any) -> Any:
        source, flags = source
        most = AT_ONCE.get(platform(), AT_ONCE_ELSEWHERE)
        size = max(n for n in range(1, most + 1) if flags.shape[0] % n == 0)
        flagged_first = jnp.argsort(~flags)

        def some(at: Any, carry: Any) -> Any:
            members = part_of(flagged_first, at * size, size)

            def refreshed(carry: Any) -> Any:
                old, seen = (jax.tree.map(lambda x: x[members], tree) for tree in (carry, source))
                new = function(kind, old, seen)
                return jax.tree.map(
                    lambda x, new, old: x.at[members].set(_where(flags[members], new, old)),
                    carry,
                    new,
                    old,
                )

            return once(jnp.any(flags[members]), refreshed, carry)[1]

        return jax.lax.fori_loop(0, flags.shape[0] // size, some, carry)

    return applied


def _where(flags: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(flags.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
