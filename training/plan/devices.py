"""Meshes of chips that are not there: of TPUs by their compiler, of GPUs by as many virtual CPU
devices."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from .chips import CHIPS, Chip
from .network import Network

TOPOLOGIES = (
    "v4:8x8x8",
    "v5e:4x4",
    "v5e:16x16",
    "v5p:8x8x8",
    "v5p:16x16x24",
    "v6e:16x16",
    "tpu7x:4x4x4",
    "h100:64",
    "h200:64",
    "b200:64",
)
"""Those that were tried; others of the same generations may work."""


def mesh_of(topology: str, sizes: Mapping[str, int], slices: int = 1) -> tuple[Mesh, Network]:
    """A mesh with `Explicit` axes over all chips of a topology, and the network between them.

    Args:
      topology: generation and chips of a slice, as v5p:8x8x8; of GPUs their number, as h100:64.
      sizes: of the mesh's axes; with slices, the first is a multiple of their number.
      slices: joined by the network of the data centre.

    Raises:
      ValueError: for topologies that are not known, sizes that do not match, or without a compiler.
    """
    first = next(iter(sizes))
    if slices < 1 or sizes[first] % slices:
        raise ValueError(
            f"{slices} slices must divide the first axis of the mesh, {first}, which has "
            f"{sizes[first]}; name one first that they divide."
        )
    chip, devices = devices_of(topology, slices)
    if len(devices) != math.prod(sizes.values()):
        raise ValueError(
            f"{topology} has {len(devices)} devices, and the mesh {math.prod(sizes.values())}; make "
            f"the sizes' product {len(devices)}."
        )
    return laid_out(chip, devices, sizes, slices)


def devices_of(topology: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The chips of a topology that is not there.

    Raises:
      ValueError: for topologies that are not known, or without a compiler.
    """
    generation, _, extent = topology.partition(":")
    known = f"known: {', '.join(TOPOLOGIES)}"
    if generation not in CHIPS or not extent:
        raise ValueError(f"unknown topology {topology!r}; {known}.")
    if not CHIPS[generation].node:
        return CHIPS[generation], _tpus(topology, slices, known)
    if not extent.isdigit() or int(extent) < 1:
        raise ValueError(f"unknown topology {topology!r}; give a number of GPUs, as h100:64.")
    return CHIPS[generation], _cpus(int(extent) * slices)


def laid_out(
    chip: Chip, devices: list[Any], sizes: Mapping[str, int], slices: int = 1
) -> tuple[Mesh, Network]:
    """Devices as a mesh, its axes along dimensions of the torus as `jax.make_mesh` lays them."""
    shape = tuple(sizes.values())
    laid = np.array(devices).reshape(shape) if chip.node else _laid(devices, shape, slices)
    mesh = Mesh(laid, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))
    return mesh, Network.of(chip, list(mesh.devices.flat))


def _laid(devices: list[Any], shape: tuple[int, ...], slices: int) -> np.ndarray:
    if slices > 1:
        inner, outer = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _cpus(count: int) -> list[Any]:
    """Virtual CPU devices in place of GPUs, for which there is no compiler without one."""
    # Without effect once JAX has started, and overridden by XLA_FLAGS.
    with contextlib.suppress(RuntimeError, ValueError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"planning for {count} GPUs needs as many virtual CPU devices, and JAX has started with "
            f"{len(devices)}; plan in a new process, without XLA_FLAGS."
        )
    return devices[:count]


def _tpus(topology: str, slices: int, known: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs the TPU's compiler, though no TPU: pip install 'ravine[pods]'."
        )
    from jax.experimental import topologies

    # The compiler queries the machine it runs on; there is none.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):  # both cores of a chip as one device, as JAX runs them
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"unknown topology {topology!r} ({reason}); {known}.") from None
    return list(found.devices)
