"""How a language model is sharded: a mesh by the names of its axes, and parameters by theirs.

The trainer's mesh has `Auto` axes: the compiler decides how activations are cut, within what is said
here of parameters, of the batch, and, by `constrained`, of the stream through the layers.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..core.checks import near
from ..core.paths import path_string
from ..optimizers.matrix.mesh.shardings import check_specs
from .shapes.shape import ModelShape

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Axes a mesh may have: copies of the model, shards of every matrix, experts of a mixture (of all else
copies), parts of every sequence, and columns or rows by layer."""
PLANNED = ("stage", *AXES)
"""The axes of the planner: also the stages of a pipeline, which cut stacks of layers."""
ROWS = ("data", "fsdp", "expert")
"""Those that cut the batch."""


def mesh_sizes(text: str, axes: Sequence[str] = AXES) -> dict[str, int]:
    """``{"fsdp": 64, "tensor": 8}`` from ``fsdp=64,tensor=8``, with known axes only.

    Example:
      >>> from ravine.training.sharding import mesh_sizes
      >>> mesh_sizes("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, _, size = pair.strip().partition("=")
        if name not in axes:
            raise ValueError(f"the mesh has no axis {name!r}; {near(name, axes)}")
        if name in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(f"give every mesh axis one size, as fsdp=64,tensor=8; got {text!r}.")
        sizes[name] = int(size)
    return sizes


def build_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run, over all devices of all processes.

    Args:
      text: sizes of its axes, as data=2,fsdp=4; without any, a mesh of one device.
      devices: which to take; by default all.

    Raises:
      ValueError: for axes that are not known, sizes whose product is not the number of devices, or no
        sizes and several processes.

    Example:
      >>> import jax
      >>> from ravine.training.sharding import build_mesh
      >>> dict(build_mesh("data=1,tensor=1", jax.devices()[:1]).shape)
      {'data': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    if not text:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes with {len(devices)} devices need a mesh; give --mesh "
                f"fsdp={len(devices)}, or other axes of {', '.join(AXES)}."
            )
        text, devices = "data=1", devices[:1]
    sizes = mesh_sizes(text)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"the mesh {text} has {math.prod(sizes.values())} devices, and there are {len(devices)} in "
            f"{jax.process_count()} process(es); make the sizes' product {len(devices)}."
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def parameter_spec(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a parameter is sharded: by columns into a block, by rows out of it, FSDP, expert and stage.

    Axes that a size does not divide stay whole.

    Example:
      >>> from ravine.training.sharding import parameter_spec
      >>> mesh = {"fsdp": 4, "tensor": 2}
      >>> parameter_spec("layers/attention/output/kernel", (2, 8, 8), mesh)
      P(None, 'tensor', 'fsdp')
      >>> parameter_spec("embed/embedding", (257, 8), mesh)  # 257 is odd
      P(None, 'fsdp')
      >>> parameter_spec("layers/experts/up/kernel", (2, 8, 8, 8), mesh | {"expert": 2})
      P(None, 'expert', 'fsdp', 'tensor')
      >>> parameter_spec("layers/up/kernel", (8, 8, 8), {"stage": 2} | mesh)
      P('stage', 'fsdp', 'tensor')
    """
    spec = role_spec(name, len(shape), sizes)
    fits = [
        axis if axis is not None and size % sizes[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*fits)


def role_spec(name: str, rank: int, axes: Collection[str]) -> PartitionSpec:
    """The same whatever the sizes, for a mesh that has these axes."""
    if name.endswith(("scale", "bias")):
        return PartitionSpec()
    out = name.endswith(("output/kernel", "down/kernel", "embedding"))
    wanted = ("tensor", "fsdp") if out else ("fsdp", "tensor")
    cut = [axis if axis in axes else None for axis in wanted]
    batch: list[str | None] = [None] * (rank - 2)
    if batch and "experts/" in name and "expert" in axes:
        batch[-1] = "expert"
    if batch and "layers/" in name and "stage" in axes:
        batch[0] = "stage"
    return PartitionSpec(*batch, *cut)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The shardings of a model's parameters, a tree like them.

    Raises:
      ValueError: for an axis of a parameter that the mesh axis which cuts it does not divide.
    """
    specs = jax.tree_util.tree_map_with_path(
        lambda path, x: role_spec(path_string(path), len(x.shape), mesh.axis_names), params
    )
    check_specs(params, specs, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def rows_of(mesh: Mesh) -> int:
    """Into how many parts the mesh cuts a batch."""
    return math.prod(mesh.shape[name] for name in ROWS if name in mesh.shape)


def batch_sharding(mesh: Mesh, batch_size: int, leading: int = 0) -> NamedSharding:
    """That of a batch, by its rows; `leading` axes before them are whole.

    Raises:
      ValueError: for a batch that cannot be cut evenly.
    """
    rows = tuple(name for name in ROWS if name in mesh.shape)
    parts = rows_of(mesh)
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide by the {parts} devices of the mesh axes "
            f"{', '.join(rows)}; make it a multiple of {parts}."
        )
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, rows))


def check_context(context: int, mesh: Mesh) -> None:
    """Refuses sequences that the mesh cannot cut evenly.

    Raises:
      ValueError: for a mesh axis `context` whose size does not divide the tokens of a sequence.
    """
    parts = mesh.shape.get("context", 1)
    if context % parts:
        raise ValueError(
            f"context {context} does not divide by the {parts} devices of the mesh axis context; make "
            f"it a multiple of {parts}."
        )


def local_shards(sharding: NamedSharding, batch_size: int) -> tuple[tuple[int, ...], int]:
    """Which shards of a batch the devices of this process hold, and how many there are in all."""
    size = sharding.shard_shape((batch_size,))[0]
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    starts = {(index or (slice(0),))[0].start or 0 for index in indices}
    return tuple(sorted(start // size for start in starts)), batch_size // size


def auto_axes(mesh: Any) -> tuple[str, ...]:
    """Axes that are left to the compiler, of a mesh without `Explicit` ones."""
    if mesh.empty or AxisType.Explicit in mesh.axis_types:
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Auto)


def one_device() -> bool:
    """Whether what is traced is for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def constrained(x: jax.Array, *entries: str | None) -> jax.Array:
    """`x` cut by mesh axes, under an `Auto` mesh that has them; elsewhere `x` itself.

    Inside of a `jax.shard_map` over some axes of such a mesh, by the others.

    Args:
      x: an array within a jitted function.
      entries: by axis of `x`: "rows" for those that cut the batch, the name of a mesh axis, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not (axes := auto_axes(mesh)):
        return x
    rows = tuple(name for name in ROWS if name in axes)
    named: dict[str | None, Any] = {"rows": rows, **{name: name for name in axes}}
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(named.get, entries)))


def of_all_positions(x_BxTxGxK: jax.Array) -> jax.Array:
    """Keys or values of whole sequences, gathered over a mesh axis that cuts them; without one, `x`.

    Queries stay cut: every device mixes its own positions with all of those before them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("context", 1) == 1:
        return x_BxTxGxK
    heads, tensor = x_BxTxGxK.shape[2], mesh.shape.get("tensor", 1)
    return constrained(x_BxTxGxK, "rows", None, None if heads % tensor else "tensor", None)


def sharded_parameters(shape: ModelShape, mesh: Mesh, *, layers_only: bool = False) -> Any:
    """A model's parameters as shapes with shardings."""
    sizes = dict(mesh.shape)
    return {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, parameter_spec(name, x.shape, sizes))
        )
        for name, x in shape.parameters().items()
        if not layers_only or ("layers/" in name and name.endswith("kernel"))
    }
