"""Distribution: one `jax.shard_map` an update, in which every device works on the blocks it holds.

Inside, types no longer say how anything is cut; each leaf's `Placement` does. The few ways in which
devices exchange anything are the functions of this file, and each is the identity where nothing is cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ....core.mapped import explicit_mapped_axes, spmd_mapped_axes
from .dealing import Deal
from .explicit import specs_after, specs_of
from .placement import Names, Placement, explicit_sizes, mesh_of, names_of, spec


class Cut(Protocol):
    """How a leaf is cut into what is worked on."""

    def local(self) -> Self:
        """The same for the part of the leaf that one device has."""
        ...


def per_shard(
    body: Callable[[Any, Any, Sequence[Any]], tuple[Any, Any]], init: Callable[[Any], Any]
) -> Callable[[Any, Any, Sequence[Cut]], tuple[Any, Any]]:
    """`body` on every device's part of its arguments, where their types say that they are cut.

    Args:
      body: of (updates, state, cuts of all leaves), to updates and state sharded as they came.
      init: from a tree like the updates to a state that is sharded as the state shall be.
    """

    def update(updates: Any, state: Any, cuts: Sequence[Cut]) -> tuple[Any, Any]:
        meshes = [mesh for x in jax.tree.leaves(updates) if (mesh := mesh_of(x)) is not None]
        if not meshes:
            return body(updates, state, cuts)
        specs = (specs_of(updates), specs_after(init, updates))
        state = jax.tree.map(_resharded, state, specs[1])
        local = lambda updates, state: body(updates, state, [cut.local() for cut in cuts])
        return _on_shards(local, specs, specs, meshes[0])(updates, state)

    return update


def _on_shards(local: Callable[..., Any], taken: Any, made: Any, mesh: Any) -> Callable[..., Any]:
    """`local` of shards, cut as arguments and results are said to be; `jax.vmap` may map it."""
    mapped = explicit_mapped_axes()

    def on_shards(*arguments: Any) -> Any:
        names = set(explicit_sizes(mesh)) | spmd_mapped_axes()
        # Loops start from constants, which would have to be declared as varying one by one.
        return jax.shard_map(
            local, mesh=mesh, in_specs=taken, out_specs=made, axis_names=names, check_vma=False
        )(*arguments)

    if not mapped:
        return on_shards
    # JAX would leave a mapped `Explicit` axis `Explicit` inside, where every reshape then has to name
    # shardings; here each device maps over what it has of it.
    with_rule = jax.custom_batching.custom_vmap(on_shards)

    @with_rule.def_vmap
    def rule(size: int, has_axis: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        del size
        left = explicit_mapped_axes()
        names = tuple(name for name in mesh.axis_names if name in mapped and name not in left)
        wider = lambda spec, has: PartitionSpec(names or None, *spec) if has else spec
        in_axes = jax.tree.map(lambda has: 0 if has else None, tuple(has_axis))
        wide_taken = jax.tree.map(wider, taken, tuple(has_axis))
        all_have = jax.tree.map(lambda _: True, made)
        wide_made = jax.tree.map(wider, made, all_have)
        mapped_local = jax.vmap(local, in_axes=in_axes)
        return _on_shards(mapped_local, wide_taken, wide_made, mesh)(*arguments), all_have

    return with_rule


def move_in(x: jax.Array, placement: Placement) -> jax.Array:
    """A leaf's part in the step, as the part that is worked on."""
    for name, source, target in placement.moves:
        x = _moved(x, name, source, target, placement)
    return x


def move_out(x: jax.Array, placement: Placement) -> jax.Array:
    """The inverse of `move_in`."""
    for name, source, target in reversed(placement.moves):
        x = _moved(x, name, target, source, placement)
    return x


def _moved(
    x: jax.Array, name: str, source: int | None, target: int | None, placement: Placement
) -> jax.Array:
    if target is None:
        return x if source is None else jax.lax.all_gather(x, name, axis=source, tiled=True)
    if source is None:
        size = x.shape[target] // placement.sizes[name]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size, target)
    return jax.lax.all_to_all(x, name, target, source, tiled=True)


def whole_matrices(
    function: Callable[[jax.Array], jax.Array],
    batch_KxMxN: jax.Array,
    rows: Names,
    columns: Names,
    sizes: Mapping[str, int],
    *,
    ragged: bool = False,
) -> jax.Array:
    """`function` of matrices whose rows and columns are cut by mesh axes, each on one device, whole.

    Every device gives away its tiles of all matrices but its share, and gets all tiles of its share: one
    `all_to_all`, and one back, of a batch padded with zeros to a multiple of the devices, or if `ragged`
    of the matrices alone. Mesh axes that cut neither rows nor columns, and on which the batch is the
    same, share it first.
    """
    count = batch_KxMxN.shape[0]
    joined = (*rows, *columns)
    tall, wide = (math.prod(sizes[name] for name in names) for names in (rows, columns))
    share: Names = ()
    for name in sizes:
        others = math.prod(sizes[n] for n in share)
        if name not in joined and count >= tall * wide * others * sizes[name] > others:
            share += (name,)
    if not joined and not share:
        return function(batch_KxMxN)
    parts = math.prod(sizes[name] for name in share)
    x = jnp.pad(batch_KxMxN, ((0, -count % parts), (0, 0), (0, 0)))
    if share:
        size = x.shape[0] // parts
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(share) * size, size)
    if joined:
        deal, (m, n) = Deal(x.shape[0], tall * wide, joined, ragged), x.shape[1:]
        tiles = deal.out(x).reshape(tall, wide, deal.most, m, n)
        x = function(tiles.transpose(2, 0, 3, 1, 4).reshape(deal.most, tall * m, wide * n))
        tiles = x.reshape(deal.most, tall, m, wide, n).transpose(1, 3, 0, 2, 4)
        x = deal.back(tiles.reshape(tall * wide, deal.most, m, n))
    else:
        x = function(x)
    if share:
        x = jax.lax.all_gather(x, share, axis=0, tiled=True)
    return x[:count]


def total(x: jax.Array, names: Names) -> jax.Array:
    """The sum over mesh axes."""
    return jax.lax.psum(x, names) if names else x


def largest(x: jax.Array, names: Names) -> jax.Array:
    """The maximum over mesh axes."""
    return jax.lax.pmax(x, names) if names else x


def zeros(shape: Sequence[int], dtype: Any, like: Any, names: Sequence[Names]) -> jax.Array:
    """Zeros cut by the given mesh axes, on the mesh of `like`."""
    mesh = mesh_of(like)
    if mesh is None:
        return jnp.zeros(shape, dtype)
    return jnp.zeros(shape, dtype, out_sharding=NamedSharding(mesh, spec(names)))


def resharded(x: jax.Array, like: Any) -> jax.Array:
    """`x`, cut by the mesh axes that cut `like`."""
    return resharded_as(x, names_of(like))


def resharded_as(x: jax.Array, names: Sequence[Names]) -> jax.Array:
    """`x`, cut by these mesh axes."""
    return _resharded(x, spec(names))


def _resharded(x: jax.Array, want: PartitionSpec) -> jax.Array:
    return x if _spec(x) == want else jax.reshard(x, want)


def _spec(x: Any) -> PartitionSpec:
    return spec(names_of(x))
