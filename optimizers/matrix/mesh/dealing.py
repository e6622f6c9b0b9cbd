"""Dealing matrices to devices that each hold a tile of every matrix, and back.

In an even deal every device gets the same number of matrices, and missing ones are sent as zeros: more
than half for 240 matrices on 512 chips. A ragged deal sends only tiles of actual matrices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ....core.platform import device_kind
from .placement import Names

NATIVE = ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x")
"""Kinds of devices for which `jax.lax.ragged_all_to_all` compiles, on whole pods. XLA for CPU has no
such operation, and XLA for v5e ("TPU v5 lite") refuses it on 16 x 16 chips."""


@dataclasses.dataclass(frozen=True)
class Deal:
    """A deal of `matrices` to the `devices` of the mesh axes `names`."""

    matrices: int
    devices: int
    names: Names
    ragged: bool

    @property
    def most(self) -> int:
        """The largest number of matrices that a device gets."""
        return -(-self.matrices // self.devices)

    def out(self, tiles_KxMxN: jax.Array) -> jax.Array:
        """From a tile of every matrix to all tiles of this device's: `[devices, most, m, n]`."""
        size, inside = self.devices * self.most, tiles_KxMxN.shape[1:]
        if self.ragged:
            starts, counts, mine = self._shares()
            space = jnp.zeros((size, *inside), tiles_KxMxN.dtype)
            rank = jax.lax.axis_index(self.names)
            places = jnp.broadcast_to(rank * self.most, self.devices)
            found = ragged_all_to_all(
                tiles_KxMxN, space, starts, counts, places, mine, self.names, self.most
            )
        else:
            padding = [(0, size - self.matrices), *[(0, 0)] * len(inside)]
            found = _even(jnp.pad(tiles_KxMxN, padding), self.names)
        return found.reshape(self.devices, self.most, *inside)

    def back(self, tiles: jax.Array) -> jax.Array:
        """The inverse of `out`."""
        tiles = tiles.reshape(self.devices * self.most, *tiles.shape[2:])
        if not self.ragged:
            return _even(tiles, self.names)[: self.matrices]
        starts, counts, mine = self._shares()
        space = jnp.zeros((self.matrices, *tiles.shape[1:]), tiles.dtype)
        first = jnp.broadcast_to(starts[jax.lax.axis_index(self.names)], self.devices)
        own = jnp.arange(self.devices, dtype=jnp.int32) * self.most
        return ragged_all_to_all(tiles, space, own, mine, first, counts, self.names, self.most)

    def _shares(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first matrix and the count of each device; and this device's count, once per device."""
        each, more = divmod(self.matrices, self.devices)
        ranks = jnp.arange(self.devices, dtype=jnp.int32)
        counts = each + (ranks < more).astype(jnp.int32)
        starts = ranks * each + jnp.minimum(ranks, more)
        mine = jnp.broadcast_to(counts[jax.lax.axis_index(self.names)], self.devices)
        return starts, counts, mine


def is_native() -> bool:
    """Whether ragged deals are one collective here."""
    return device_kind() in NATIVE


def _even(tiles: jax.Array, names: Names) -> jax.Array:
    """The i-th part of the first axis to device i, from every device."""
    # Without the barrier XLA for CPU (JAX 0.10) infers that padding is zero, gives it a different
    # layout than the neighbouring tiles, and refuses its own program.
    return jax.lax.all_to_all(jax.lax.optimization_barrier(tiles), names, 0, 0, tiled=True)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    names: Names,
    longest: int,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, or, where it is missing, the same with padding to the `longest`."""
    if is_native():
        return jax.lax.ragged_all_to_all(
            operand,
            output,
            input_offsets,
            send_sizes,
            output_offsets,
            recv_sizes,
            axis_name=names,
        )
    within = jnp.arange(longest, dtype=jnp.int32)[None]
    swapped = lambda x: _even(x.reshape(-1, *x.shape[2:]), names)
    sent = jnp.take(operand, input_offsets[:, None] + within, axis=0, mode="fill", fill_value=0)
    places = output_offsets[:, None] + within
    places = jnp.where(within < send_sizes[:, None], places, output.shape[0])
    return output.at[swapped(places)].set(swapped(sent), mode="drop")
