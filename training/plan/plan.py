"""What an optimizer costs on a TPU pod, found by the TPU's own compiler without a TPU.

The update is compiled for every chip of the topology, with the shapes and shardings of a published
model; nothing is allocated or run. What the compiler says is printed: memory a chip, collectives and
whether any of them sits in a loop, arithmetic, and what is held more than once.
"""

import dataclasses
import importlib.util
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from rich.console import Console

from ...core.checks import near
from ...optimizers import Blocks
from ...optimizers.matrix.algebra.polar import NewtonSchulz
from ...optimizers.registry import OptimizerConfig
from ..shapes.presets import PRESETS
from ..shapes.shape import ModelShape
from ..sharding import mesh_sizes, sharded_parameters
from .collectives import Collective, collectives
from .compile import Compiled, auto, compiled_train_step, compiled_update, rows_for, trainer_model
from .flops import Arithmetic
from .table import HBM, show

TOPOLOGIES = (
    "v4:8x8x8",
    "v5e:4x4",
    "v5e:16x16",
    "v5p:8x8x8",
    "v5p:16x16x24",
    "v6e:16x16",
    "tpu7x:4x4x4",
)
"""Those that were tried; others of the same generations may work."""
ALIGNED = {"blocks": Blocks(size=128, vocabulary=65_536)}
POLAR = {"polar": NewtonSchulz(dtype="bfloat16", halvings=0)}
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("shampoo", "soap", "kl_shampoo"), ALIGNED),
    **dict.fromkeys(("muon", "normuon", "adamuon"), POLAR),
}
"""What differs from the defaults: blocks that shards of large matrices do not cross, and products in
bfloat16 for orthogonalization, as it is run on accelerators."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile an optimizer for a TPU pod, without one, and print what it costs a chip."""

    model: str = "llama2-70b"
    """A model of `ravine.training.shapes.presets`."""
    optimizer: str = "shampoo"
    """A registered name."""
    compare: str = ""
    """Names, separated by commas: one table of all of them instead."""
    options: str = "{}"
    """Hyperparameters of the optimizer, as JSON; by default those of `OPTIONS`."""
    topology: str = "v5p:8x8x8"
    """Generation and chips, as v5p:8x8x8."""
    mesh: str = "fsdp=64,tensor=8"
    """Sizes of the mesh's axes: data, fsdp and tensor."""
    batch: int = 0
    """Tokens a step over all chips, to compare the optimizer's arithmetic with the model's."""
    layers_only: bool = False
    """Leave out embedding, head and norms."""
    train_step: bool = False
    """Compile the whole train step, of the trainer's model in these shapes, instead of the update."""

    @property
    def names(self) -> tuple[str, ...]:
        """The optimizers to plan."""
        words = self.compare.split(",") if self.compare else [self.optimizer]
        return tuple(word.strip() for word in words)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one optimizer costs; bytes and arithmetic are of one chip."""

    optimizer: str
    parameters: int
    state: int
    temporary: int
    arithmetic: Arithmetic
    collectives: tuple[Collective, ...]
    repeated: dict[str, int]
    """By path in the state: how many chips hold the same, where more than one do."""
    gradients: int
    """0 in a train step, where they are among the temporaries."""
    seconds: float
    """To trace and compile."""

    @property
    def memory(self) -> int:
        """Bytes of all of it; parameters and state are updated in place."""
        return self.parameters + self.gradients + self.state + self.temporary

    @property
    def sent(self) -> float:
        """Bytes one chip sends in a step, by the rules of `ravine.training.plan.collectives`."""
        return sum(c.total for c in self.collectives if c.always)

    @property
    def sent_at_times(self) -> float:
        """More, in branches and in loops of unknown length."""
        return sum(c.total for c in self.collectives if not c.always)


def plan(config: PlanConfig, console: Console | None = None) -> list[Plan]:
    """Plans every optimizer and prints what was found.

    Raises:
      ValueError: for unknown names, a mesh that does not match the topology, options that are no JSON
        object, or without the TPU compiler.
    """
    console = console or Console()
    shape = _known("model", config.model, PRESETS)
    sizes = mesh_sizes(config.mesh)
    optimizers = {name: _build(name, config.options) for name in config.names}
    mesh = Mesh(
        _devices(config.topology, math.prod(sizes.values())).reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Explicit,) * len(sizes),
    )
    compile_with, tokens = _work(config, shape, mesh)
    plans, count = [], 0
    for name, tx in optimizers.items():
        with console.status(f"compiling {name} for {config.topology}"):
            found = compile_with(tx)
        plans.append(plan_of(name, found, mesh, is_step=config.train_step))
        count = sum(x.size for x in jax.tree.leaves(found.params))
    given = {name: assumed(name, json.loads(config.options)) for name in optimizers}
    show(config, count, tokens, plans, given, console)
    return plans


def _work(config: PlanConfig, shape: ModelShape, mesh: Mesh) -> tuple[Any, int]:
    """What compiles an optimizer's program, and the tokens a step of it takes."""
    if not config.train_step:
        params = sharded_parameters(shape, mesh, layers_only=config.layers_only)
        return lambda tx: compiled_update(tx, params, mesh), 0
    if config.layers_only:
        raise ValueError("a train step needs all of the model; leave out --layers-only.")
    model, over = trainer_model(config.model, shape), auto(mesh)
    rows = rows_for(config.batch, model.context, over)
    return lambda tx: compiled_train_step(model, tx, over, rows), rows * model.context


def plan_of(name: str, compiled: Compiled, mesh: Mesh, *, is_step: bool = False) -> Plan:
    """The plan of what was compiled."""
    memory = compiled.program.memory_analysis()
    assert memory is not None, "the TPU's compiler always says"
    return Plan(
        name,
        parameters=_bytes(compiled.params),
        state=_bytes(compiled.state),
        temporary=memory.temp_size_in_bytes,
        arithmetic=compiled.arithmetic,
        collectives=tuple(collectives(compiled.program.as_text() or "", mesh.size)),
        repeated=_repeated(compiled.state, mesh),
        gradients=0 if is_step else _bytes(compiled.params),
        seconds=compiled.seconds,
    )


def _bytes(tree: Any) -> int:
    """On one chip."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shards)


def _repeated(state: Any, mesh: Mesh) -> dict[str, int]:
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        shard = math.prod(x.sharding.shard_shape(x.shape))
        copies = mesh.size * shard // max(1, math.prod(x.shape))
        if x.ndim > 1 and copies > 1:
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = copies
    return found


def _build(name: str, options: str) -> optax.GradientTransformation:
    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options must be a JSON object, got {options!r}: {error}.") from None
    if not isinstance(given, dict):
        raise ValueError(f"options must be a JSON object, got {options!r}.")
    return OptimizerConfig(name, given).build(1e-3, **assumed(name, given))


def assumed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the planner sets otherwise than the optimizer's own defaults, unless it is given."""
    return {k: v for k, v in OPTIONS.get(name, {}).items() if k not in given}


def _known(what: str, name: str, table: Any) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {near(name, table)}")
    return table[name]


def _devices(topology: str, count: int) -> np.ndarray:
    """The chips of a topology that is not there."""
    known = f"known: {', '.join(TOPOLOGIES)}"
    generation = topology.partition(":")[0]
    if generation not in HBM or ":" not in topology:
        raise ValueError(f"unknown topology {topology!r}; {known}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning needs the TPU's compiler, though no TPU: pip install 'ravine[pods]'."
        )
    from jax.experimental import topologies

    # The compiler asks where it runs; it runs nowhere.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"unknown topology {topology!r} ({reason}); {known}.") from None
    if len(devices) != count:
        raise ValueError(
            f"{topology} has {len(devices)} devices, and the mesh {count}; make the sizes' product "
            f"{len(devices)}."
        )
    return np.array(devices)
