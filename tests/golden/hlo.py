"""The text of compiled programs with collectives, for `tests/test_collectives.py`.

    PYTHONPATH=.cache/tpu python tests/golden/hlo.py    # after `make .cache/tpu/.installed`

compiles each collective by itself, in a loop of 7, in nested loops of 3 and 5, beside a product in a
scan over 12 layers, and in a branch: for 16 chips of a v5p with the TPU's compiler, and for 8 CPU
devices. Text that has nothing to do with communication (metadata, layouts of windows) is removed.
"""

import json
import os
import re
from pathlib import Path

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
RING = [(i, (i + 1) % 4) for i in range(4)]


def gather(x):
    return lax.all_gather(x, "x", axis=0, tiled=True).reshape(4, *x.shape).max(0)


def scatter(x):
    parts = jnp.concatenate([x * (i + 1) for i in range(4)])
    return lax.psum_scatter(parts, "x", scatter_dimension=0, tiled=True)


def ragged(x):
    rows = jnp.full(4, x.shape[0] // 4, jnp.int32)
    starts = jnp.arange(4, dtype=jnp.int32) * rows
    there = jnp.full(4, lax.axis_index("x") * rows[0], jnp.int32)
    return lax.ragged_all_to_all(x, jnp.zeros_like(x), starts, rows, there, rows, axis_name="x")


KINDS = {
    "all-gather": gather,
    "reduce-scatter": scatter,
    "all-reduce": lambda x: lax.psum(x, "x"),
    "all-to-all": lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(x, "x", RING),
    "ragged-all-to-all": ragged,
}


def loop(f, times):
    return lambda x: lax.fori_loop(0, times, lambda _, x: f(x) * 1.5, x)


FORMS = {
    "plain": lambda f: lambda x, w, due: f(x),
    "loop": lambda f: lambda x, w, due: loop(f, 7)(x),
    "nested": lambda f: lambda x, w, due: loop(loop(f, 5), 3)(x),
    "scan": lambda f: lambda x, w, due: lax.scan(lambda h, w: (f(jnp.tanh(h @ w)), None), x, w)[0],
    "branch": lambda f: lambda x, w, due: lax.cond(due, f, lambda x: x, x),
}


def text(kind, form, mesh):
    specs = (P("x", "y"), P(), P())
    shapes = (
        ((1024, 512 * mesh.shape["y"]), jnp.float32),
        ((12, 512, 512), jnp.float32),
        ((), bool),
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    function = jax.shard_map(
        FORMS[form](KINDS[kind]), mesh=mesh, in_specs=specs, out_specs=P("x", "y"), check_vma=False
    )
    with jax.set_mesh(mesh):
        found = jax.jit(function).lower(*arguments).compile().as_text()
    trips = r'backend_config=\{[^\n]*?("known_trip_count":\{"n":"\d+"\})[^\n]*'
    found = re.sub(trips, r"backend_config={\1}", found)
    found = re.sub(r", metadata=\{[^}]*\}", "", found)
    found = re.sub(r", backend_config=\{(?!\"known_trip)[^\n]*", "", found)
    lines = found.splitlines()
    return "\n".join(line for line in lines if re.match(r"[%E}]|  ", line)) + "\n"


def main():
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4").devices
    meshes = {
        name: Mesh(
            np.array(devices).reshape(shape), ("x", "y"), axis_types=(AxisType.Explicit,) * 2
        )
        for name, devices, shape in (("tpu", chips, (4, 4)), ("cpu", jax.devices(), (4, 2)))
    }
    texts = {}
    for platform, mesh in meshes.items():
        for kind in KINDS:
            for form in FORMS:
                if (platform, kind) != ("cpu", "ragged-all-to-all"):  # XLA for CPU has none
                    texts[f"{platform}/{kind}/{form}"] = text(kind, form, mesh)
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(texts, indent=0) + "\n")


if __name__ == "__main__":
    main()
