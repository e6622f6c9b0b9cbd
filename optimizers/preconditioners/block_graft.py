"""The graft of blocks: the directions of Shampoo with the sizes of another step."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..links.graft import norm_ratio
from ..matrix.mesh.placement import Names
from .tensors import Tensors


class BlockGraft(NamedTuple):
    """How large the blocks of a direction are, and which take the other step instead."""

    per: str
    """What gets one size: a "block", a "parameter", or "none", which leaves directions unchanged."""
    started: jax.Array
    """Whether directions are used; before, all blocks take the other step."""

    def of_batch(
        self,
        directions: jax.Array,
        steps: jax.Array,
        distrusted: Sequence[jax.Array],
        order: int,
        summed: Names,
    ) -> tuple[jax.Array, jax.Array]:
        """Blocks `[..., *sizes]`, and the ratios `[...]` of sizes.

        Directions stay as they are with one size per parameter, see `of_parameters`.

        Args:
          directions: the blocks.
          steps: the same blocks of the other step.
          distrusted: for each factor, which blocks have no root to trust, `[...]`.
          order: how many sizes a block has.
          summed: mesh axes that cut through the blocks.
        """
        inside = tuple(range(-order, 0))
        if self.per == "block":
            ratios = norm_ratio(steps, directions, inside, keep=False, summed=summed)
        else:
            ratios = jnp.ones(directions.shape[: directions.ndim - order], directions.dtype)
        if self.per == "parameter":
            return directions, ratios
        return self._sized(directions, steps, distrusted, ratios), ratios

    def of_parameters(
        self,
        tensors: Tensors,
        directions: Sequence[jax.Array],
        steps: Sequence[jax.Array],
        distrusted: Sequence[Sequence[jax.Array]],
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The blocks of all tensors, with one size for each leaf, and the ratios of sizes."""

        def ratio(
            names: Names, steps: Sequence[jax.Array], directions: Sequence[jax.Array]
        ) -> jax.Array:
            d, p = (jnp.concatenate([x.reshape(-1) for x in each]) for each in (steps, directions))
            return norm_ratio(d, p, (0,), keep=False, summed=names)

        ratios = tensors.numbers(ratio, steps, directions)
        return list(map(self._sized, directions, steps, distrusted, ratios)), ratios

    def _sized(
        self,
        directions: jax.Array,
        steps: jax.Array,
        distrusted: Sequence[jax.Array],
        ratios: jax.Array,
    ) -> jax.Array:
        """Directions `[..., *sizes]` times their ratios `[...]`, or steps where they are not used."""
        left_out = functools.reduce(jnp.logical_or, distrusted, ~self.started)
        wider = (..., *(None,) * (directions.ndim - ratios.ndim))
        return jnp.where(
            jnp.broadcast_to(left_out, ratios.shape)[wider], steps, directions * ratios[wider]
        )
