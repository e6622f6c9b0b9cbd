"""Placement: which mesh axes cut a leaf while its matrices are processed, and how it gets there.

A mesh axis that cuts a leaf between blocks stays where it is: every device has whole blocks, and
nothing is communicated. One that would cut through a block is moved to an axis of the leaf that it can
cut between blocks, by one `all_to_all`, or, if there is no such axis, is gathered. Mesh axes that the
leaf does not use get a share of the blocks too. Remaining mesh axes repeat the work. All of this
depends on shapes and names only.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, PartitionSpec

from ....core.mapped import mapped_axes

Names = tuple[str, ...]
"""Mesh axes that cut one axis of an array, slowest first."""


class Move(NamedTuple):
    """One mesh axis, from the axis of the leaf that it cuts to the one that it should cut."""

    name: str
    source: int | None
    target: int | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a leaf is processed; made by `place`."""

    outside: tuple[Names, ...]
    """By axis of the leaf: the mesh axes that cut it in the step."""
    inside: tuple[Names, ...]
    """By axis of the leaf: the mesh axes that cut it while its blocks are processed."""
    moves: tuple[Move, ...]
    """From outside to inside, in this order."""
    summed: Names
    """Mesh axes that cut through blocks, along axes over which only sums are needed."""
    sizes: Mapping[str, int]
    """The sizes of the mesh's axes."""

    @property
    def repeated(self) -> int:
        """How many devices do the same work."""
        return math.prod(self.sizes[move.name] for move in self.moves if move.target is None)

    def parts(self, names: Names) -> int:
        """The number of parts into which these mesh axes cut together."""
        return math.prod(self.sizes[name] for name in names)


class Spread(NamedTuple):
    """How the blocks of a leaf are indexed, and shared by devices."""

    batch_axes: int = 1
    """How many leading axes index blocks, as `[*batch, *counts]`; functions receive one."""
    layers: int = 1
    """The length of the first of these over all devices, if it is one of the leaf's batch axes."""
    layer_names: Names = ()
    """The mesh axes that cut that axis."""
    cut: frozenset[str] = frozenset()
    """The mesh axes along which devices have different blocks; along all others they repeat them."""
    shards: int = 1
    """How many devices share the blocks equally."""


ALONE = Spread()
WHOLE = Placement((), (), (), (), {})
"""The placement of a leaf that is processed whole."""


def place(
    outside: Sequence[Names],
    cuts: Sequence[int],
    sizes: Mapping[str, int],
    sums: Collection[int] = (),
) -> Placement:
    """The placement of a leaf.

    Args:
      outside: by axis of the leaf, the mesh axes that cut it outside.
      cuts: by axis of the leaf, the number of equal parts between which it may be cut; one for none.
      sizes: sizes of the mesh's axes, by name.
      sums: axes of the leaf that may be cut anywhere, since only sums over them are needed.

    Example:
      >>> from ravine.optimizers.matrix.mesh.placement import place
      >>> mesh = {"data": 2, "tensor": 4}
      >>> place([(), ("tensor",)], [3, 8], mesh).inside  # eight blocks of columns: no communication
      ((), ('tensor', 'data'))
      >>> place([("tensor",), ()], [1, 8], mesh).moves  # rows must be whole: moved to the columns
      (Move(name='tensor', source=0, target=1), Move(name='data', source=None, target=1))
    """
    inside: list[Names] = []
    left: list[int] = []
    free: list[tuple[str, int | None]] = []
    for axis, (names, cut) in enumerate(zip(outside, cuts, strict=True)):
        kept = len(names)
        while axis not in sums and cut % math.prod(sizes[name] for name in names[:kept]):
            kept -= 1
        inside.append(tuple(names[:kept]))
        left.append(1 if axis in sums else cut // math.prod(sizes[n] for n in names[:kept]))
        # The fastest axes are joined first.
        free += [(name, axis) for name in reversed(names[kept:])]
    used = {name for names in outside for name in names}
    free += [(name, None) for name in sizes if name not in used]
    moves = []
    for name, source in free:
        able = [axis for axis, n in enumerate(left) if sizes[name] > 1 and n % sizes[name] == 0]
        target = max(able, key=left.__getitem__, default=None)
        if target is not None:
            left[target] //= sizes[name]
            inside[target] += (name,)
        if sizes[name] > 1:
            moves.append(Move(name, source, target))
    return Placement(
        tuple(tuple(names) for names in outside),
        tuple(inside),
        tuple(moves),
        tuple(name for axis in sums for name in inside[axis]),
        dict(sizes),
    )


def names_of(x: Any) -> tuple[Names, ...]:
    """By axis of an array, the mesh axes that cut it according to its type.

    Types contain only axes of an `Explicit` mesh; under an `Auto` mesh the compiler decides.
    """
    mesh = mesh_of(x)
    spec = () if mesh is None else _sharding(x).spec
    explicit = () if mesh is None else explicit_sizes(mesh)
    found = [() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in spec]
    named = [tuple(name for name in names if name in explicit) for names in found]
    return (*named, *((),) * (len(x.shape) - len(named)))


def spec(names: Sequence[Names]) -> PartitionSpec:
    """The equivalent specification; see `names_of`."""
    entries = [None if not axis else axis[0] if len(axis) == 1 else axis for axis in names]
    return PartitionSpec(*entries)


def mesh_of(x: Any) -> Any:
    """The mesh in an array's type if it has `Explicit` axes, else None."""
    mesh = None if isinstance(x, np.ndarray) else getattr(_sharding(x), "mesh", None)
    return mesh if mesh is not None and explicit_sizes(mesh) else None


def mesh_in(tree: Any) -> Any:
    """The mesh in the types of a tree's leaves, if it has `Explicit` axes, else None."""
    return next((mesh for x in jax.tree.leaves(tree) if (mesh := mesh_of(x)) is not None), None)


def explicit_sizes(mesh: Any) -> dict[str, int]:
    """Sizes by name of the mesh's `Explicit` axes, except those that `jax.vmap` maps over."""
    return {name: mesh.shape[name] for name in axes_of_type(mesh, AxisType.Explicit)}


def axes_of_type(mesh: Any, wanted: AxisType) -> list[str]:
    """The names of the mesh's axes of a type, except those that `jax.vmap` maps over."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    found = [name for name, kind in kinds if kind == wanted]
    mapped = mapped_axes() if found else ()
    return [name for name in found if name not in mapped]


def _sharding(x: Any) -> Any:
    """That of the value if there is one, with its devices; otherwise that of the type."""
    if isinstance(x, jax.ShapeDtypeStruct) or not isinstance(x, Tracer):
        return getattr(x, "sharding", None)
    return jax.typeof(x).sharding
