"""Distribution: one `jax.shard_map` per update, in which every device works on the blocks it holds.

Inside, types no longer say how arrays are cut; each leaf's `Placement` does. Apart from sums
(`jax.lax.psum`), the functions of this file are the only communication between devices. Each is the
identity where nothing is cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ....core.mapped import explicit_mapped_axes, spmd_mapped_axes
from .dealing import Deal
from .explicit import auto_axes, explicitly, specs_after, specs_of, specs_of_state
from .placement import Names, Placement, explicit_sizes, mesh_in, mesh_of, names_of, spec


class Cut(Protocol):
    """How a leaf is cut into the parts that are processed."""

    def local(self) -> Self:
        """The same for the part of the leaf on one device."""
        ...


def per_shard(
    body: Callable[..., Any],
    init: Callable[[Any], Any],
    cuts: Callable[[Any], Sequence[Cut]],
    made: Callable[[Any], Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> Callable[[Any, Any], Any]:
    """`body` on every device's part of its arguments, if their types say that they are cut.

    Args:
      body: maps (updates, state, cuts of all leaves) to updates and state with unchanged shardings;
        the numbers are arguments by their names.
      init: maps a tree like the updates to a state with the shardings that the state should have.
      cuts: finds how the leaves of the updates are cut.
      made: for other results, maps the updates to how the results are cut.
      numbers: hyperparameters, which are arrays if they are injected. The body may not close over
        arrays, see "Closing over inputs to shard_map" in JAX.
    """
    fixed = {k: x for k, x in (numbers or {}).items() if not isinstance(x, jax.Array)}
    arrays = {k: x for k, x in (numbers or {}).items() if isinstance(x, jax.Array)}
    whole = dict.fromkeys(arrays, PartitionSpec())

    def update(updates: Any, state: Any, arrays: Mapping[str, jax.Array]) -> Any:
        mesh = mesh_in(updates)
        if mesh is None:
            return body(updates, state, cuts(updates), **fixed, **arrays)
        if auto_axes(mesh):
            specs = specs_of(updates)
            state_specs = specs_of_state(init, updates, specs, mesh.abstract_mesh)
            return explicitly(mesh, update, (specs, state_specs, whole), updates, state, arrays)
        specs, found = (specs_of(updates), specs_after(init, updates)), cuts(updates)
        state = jax.tree.map(_resharded, state, specs[1])
        results = specs if made is None else made(updates)

        def local(updates: Any, state: Any, arrays: Mapping[str, jax.Array]) -> Any:
            return body(updates, state, [cut.local() for cut in found], **fixed, **arrays)

        return _on_shards(local, (*specs, whole), results, mesh)(updates, state, arrays)

    return lambda updates, state: update(updates, state, arrays)


def _on_shards(local: Callable[..., Any], taken: Any, made: Any, mesh: Any) -> Callable[..., Any]:
    """`local` on shards, with arguments and results cut as specified; `jax.vmap` may map it."""
    mapped = explicit_mapped_axes()

    def on_shards(*arguments: Any) -> Any:
        names = set(explicit_sizes(mesh)) | spmd_mapped_axes()
        # Loops start from constants, which would all have to be declared as varying, one by one.
        return jax.shard_map(
            local, mesh=mesh, in_specs=taken, out_specs=made, axis_names=names, check_vma=False
        )(*arguments)

    if not mapped:
        return on_shards
    # JAX would leave a mapped `Explicit` axis `Explicit` inside, where every reshape would have to name
    # shardings; here each device maps over its own part.
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
    """A leaf's part in the step, moved to where it is processed."""
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
    """`function` of matrices with rows and columns cut by mesh axes, each whole on one device.

    Every device sends its tiles of all matrices outside its share, and receives all tiles of its share:
    one `all_to_all`, and one back, with a batch padded with zeros to a multiple of the devices, or, if
    `ragged`, with the matrices alone. Mesh axes that cut neither rows nor columns, and on which the
    batch is replicated, share it first.
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


def largest(x: Any, names: Names) -> Any:
    """The maximum over mesh axes, of every array of a tree."""
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
