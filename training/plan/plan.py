"""What an optimizer costs on a pod or a cluster, found without one.

The update is compiled for every chip of the topology, with the shapes and shardings of a published
model; nothing is allocated or run. The TPU's own compiler reports how much memory is needed
and what is communicated; for GPUs, whose compiler is not available, XLA's for CPU reports it for as
many virtual devices. Arithmetic is counted in the traced program, the model's part by hand
(`by_hand`), and times follow by a roofline (`roofline`).
"""

import dataclasses
import json
import re
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from ...core.checks import check_amount
from ...core.platform import standing_in_for
from ...optimizers import Blocks
from ...optimizers.registry import OptimizerConfig
from ...optimizers.registry import names as registered
from ..shapes.given import given_shape
from ..shapes.shape import ModelShape
from ..sharding import PLANNED, mesh_sizes, rows_of, sharded_parameters
from .by_hand import Remat, Work, against_stages
from .compile import auto, compiled_train_step, compiled_update, rows_for, trainer_model
from .cost import Plan, plan_of
from .devices import mesh_of
from .find import find_mesh
from .network import Network
from .report import to_json
from .table import Shown, show
from .verdict import spare

ALIGNED = {"blocks": Blocks(size=128, vocabulary=65_536)}
OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("shampoo", "soap", "kl_shampoo", "soap_muon"), ALIGNED
)
"""What differs from the defaults: blocks that shards of large matrices do not cross."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Find what an optimizer costs per chip of a TPU pod or GPU cluster, without one."""

    model: str = "llama2-70b"
    """A published model, or sizes as JSON: '{"like": "llama3-8b", "layers": 16}'."""
    optimizer: str = "shampoo"
    """The optimizer to plan."""
    compare: str = ""
    """Several of them in one table, separated by commas, or all; the fastest that fits comes first."""
    options: str = "{}"
    """Hyperparameters, as JSON. The plan says where it takes others than the library's defaults."""
    topology: str = "v5p:8x8x8"
    """Generation and chips, as v5p:8x8x8; or GPUs and their number, as h100:64."""
    mesh: str = "fsdp=64,tensor=8"
    """Sizes of the mesh's axes: stage, data, fsdp, expert, context and tensor."""
    slices: int = 1
    """Slices of that topology, joined by the data centre's network along the mesh's first axis."""
    batch: int = 0
    """Tokens per step over all chips. 0 takes one sequence for each of data x fsdp x expert shards."""
    micro_batches: int = 1
    """Parts of the batch, processed one after the other, or passed along the pipeline's stages."""
    remat: Remat = "full"
    """What is recomputed in the backward pass: whole layers, all but products, or nothing."""
    master_copy: bool = False
    """Keep a float32 copy of the parameters, which the update reads and writes."""
    state_on_host: bool = False
    """Keep the optimizer's state in the host's memory, and compile for that (pinned_host)."""
    fused_loss: bool = False
    """The loss without all logits at once, `ravine.stability.fused_cross_entropy`."""
    layers_only: bool = False
    """Leave out embedding, head and norms."""
    train_step: bool = False
    """Compile a whole train step of the trainer's model with these sizes, instead of the update."""
    peak: bool = False
    """Take the published peaks for the rates of products and attention: times become lower bounds."""
    find_mesh: bool = False
    """Try all meshes that divide, and plan for the best; --mesh and --micro-batches are ignored."""
    json: bool = False
    """Print JSON, for machines."""

    @property
    def names(self) -> tuple[str, ...]:
        """The optimizers to plan."""
        if self.compare == "all":
            return registered()
        words = self.compare.split(",") if self.compare else [self.optimizer]
        return tuple(word.strip() for word in words)

    def __post_init__(self) -> None:
        check_amount(1, slices=self.slices, micro_batches=self.micro_batches)
        check_amount(0, batch=self.batch)
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"{name!r} is given twice; name each optimizer once.")


def plan(config: PlanConfig, console: Console | None = None) -> list[Plan]:
    """Plans every optimizer and prints what was found, the fastest that fits first.

    Raises:
      ValueError: for unknown names, a mesh that does not match the topology, options that are no JSON
        object, or without the TPU compiler.
    """
    console = console or Console()
    shape = given_shape(config.model)
    sizes = mesh_sizes(config.mesh, PLANNED)
    optimizers = {name: _build(name, config.options) for name in config.names}
    if config.find_mesh:
        config = find_mesh(config, shape, next(iter(optimizers.values())), console)
        sizes = mesh_sizes(config.mesh, PLANNED)
    mesh, network = mesh_of(config.topology, sizes, config.slices)
    if config.peak:
        network = dataclasses.replace(network, chip=network.chip.at_peak())
    work = _work(config, shape, mesh)
    program = _program(config, shape, mesh, work)
    waiting = Console(stderr=True, quiet=console.quiet)
    plans = []
    for name, tx in optimizers.items():
        with waiting.status(f"compiling {name} for {config.topology}"):
            try:
                with standing_in_for("gpu" if network.chip.node else None):
                    found = program(name, tx)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                if not config.compare:
                    raise ValueError(f"{name}: {_reason(error)}") from None
                plans.append(Plan(name, refused=_reason(error)))
                continue
        one = plan_of(
            *(name, found, mesh, network, work),
            is_step=config.train_step,
            on_host=config.state_on_host,
            master_copy=config.master_copy,
        )
        plans.append(one)
    plans.sort(key=lambda found: _order(found, network))
    if config.json:
        console.out(to_json(config, plans, network, work), highlight=False)
        return plans
    given = {name: assumed(name, json.loads(config.options)) for name in optimizers}
    show(Shown(config, work, network, given), plans, console)
    return plans


def _order(found: Plan, network: Network) -> tuple[bool, bool, float]:
    return bool(found.refused), spare(found, network.chip) < 0, found.estimate.step


def _reason(error: Exception) -> str:
    """In one line; of a compiler that runs out of memory, how much it needed."""
    text = " ".join(str(error).split())
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    if used:
        return f"the program needs {used[1]} of {used[2]} memory."
    return text if len(text) < 300 else f"{text[:300]} ..."


def _work(config: PlanConfig, shape: ModelShape, mesh: Mesh) -> Work:
    rows = rows_for(config.batch, shape.context, mesh)
    least = rows_of(mesh) * config.micro_batches
    if rows // rows_of(mesh) % config.micro_batches:
        raise ValueError(
            f"{config.micro_batches} micro-batches do not divide the {rows // rows_of(mesh)} "
            f"sequences of each shard; give --batch {least * shape.context} or a multiple."
        )
    stages, parts = mesh.shape.get("stage", 1), mesh.shape.get("context", 1)
    if refused := against_stages(shape, stages):
        raise ValueError(refused)
    if shape.context % parts:
        raise ValueError(
            f"the context axis of {parts} does not divide sequences of {shape.context} tokens."
        )
    tokens = rows * shape.context
    return Work(
        shape, dict(mesh.shape), tokens, config.remat, config.micro_batches, config.fused_loss
    )


def _program(config: PlanConfig, shape: ModelShape, mesh: Mesh, work: Work) -> Any:
    """The function that compiles an optimizer's program."""
    if not config.train_step:
        params = sharded_parameters(shape, mesh, layers_only=config.layers_only)
        return lambda _, tx: compiled_update(tx, params, mesh, on_host=config.state_on_host)
    stages = mesh.shape.get("stage", 1)
    if config.micro_batches % stages:
        raise ValueError(
            f"in a compiled step {stages} stages share the loss of the micro-batches; give "
            f"--micro-batches {stages} or a multiple."
        )
    if config.layers_only:
        raise ValueError("a train step needs all of the model; leave out --layers-only.")
    if config.remat == "none":
        raise ValueError(
            "the trainer's model recomputes what follows from products; leave out --train-step, or "
            "give --remat products."
        )
    model, over = trainer_model(config.model, shape), auto(mesh)
    model = dataclasses.replace(model, remat=config.remat == "full")
    rows = work.tokens // model.context
    options = {"fused": config.fused_loss, "on_host": config.state_on_host}
    return lambda name, tx: compiled_train_step(
        model, tx, over, rows, config.micro_batches, optimizer=name, **options
    )


def _build(name: str, options: str) -> optax.GradientTransformation:
    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise ValueError(f"options must be a JSON object, got {options!r}: {error}.") from None
    if not isinstance(given, dict):
        raise ValueError(f"options must be a JSON object, got {options!r}.")
    return OptimizerConfig(name, given).build(1e-3, **assumed(name, given))


def assumed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Where the planner differs from the optimizer's own defaults, unless given."""
    return {k: v for k, v in OPTIONS.get(name, {}).items() if k not in given}
