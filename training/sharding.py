"""How a language model is sharded: a mesh by the names of its axes, and parameters by theirs."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..optimizers.registry import near
from .presets import ModelShape

AXES = ("data", "fsdp", "tensor")
"""Axes a mesh may have: copies of the model, shards of every matrix, and columns or rows by layer."""


def mesh_sizes(text: str) -> dict[str, int]:
    """``{"fsdp": 64, "tensor": 8}`` from ``fsdp=64,tensor=8``.

    Example:
      >>> from ravine.training.sharding import mesh_sizes
      >>> mesh_sizes("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, _, size = pair.strip().partition("=")
        if name not in AXES:
            raise ValueError(f"the mesh has no axis {name!r}; {near(name, AXES)}")
        if name in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(f"give every mesh axis one size, as fsdp=64,tensor=8; got {text!r}.")
        sizes[name] = int(size)
    return sizes


def parameter_spec(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """How a parameter is sharded: by columns into a block, by rows out of it, and by FSDP.

    Axes that a size does not divide stay whole.

    Example:
      >>> from ravine.training.sharding import parameter_spec
      >>> mesh = {"fsdp": 4, "tensor": 2}
      >>> parameter_spec("layers/attention/output/kernel", (2, 8, 8), mesh)
      P(None, 'tensor', 'fsdp')
      >>> parameter_spec("embed/embedding", (257, 8), mesh)  # 257 is odd
      P(None, 'fsdp')
    """
    if name.endswith(("scale", "bias")):
        return PartitionSpec()
    out = name.endswith(("output/kernel", "down/kernel", "embedding"))
    wanted = ("tensor", "fsdp") if out else ("fsdp", "tensor")
    fits = [
        axis if axis in sizes and size % sizes[axis] == 0 else None
        for axis, size in zip(wanted, shape[-2:], strict=True)
    ]
    return PartitionSpec(*[None] * (len(shape) - 2), *fits)


def sharded_parameters(shape: ModelShape, mesh: Mesh, *, layers_only: bool = False) -> Any:
    """A model's parameters as shapes with shardings."""
    sizes = dict(mesh.shape)
    return {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, parameter_spec(name, x.shape, sizes))
        )
        for name, x in shape.parameters().items()
        if not layers_only or (name.startswith("layers/") and name.endswith("kernel"))
    }
