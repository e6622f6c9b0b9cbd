"""``--find-mesh``: the best meshes by hand, printed, and the best of them for a plan."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from ..shapes.shape import ModelShape
from .by_hand import Work, against_stages
from .devices import devices_of, laid_out
from .search import Candidate, candidates, stages_of
from .table import print_whole
from .verdict import milliseconds, readable, thousands

if TYPE_CHECKING:
    from .plan import PlanConfig

SHOWN = 5


def find_mesh(
    config: "PlanConfig",
    shape: ModelShape,
    tx: optax.GradientTransformation,
    console: Console,
) -> "PlanConfig":
    """The configuration with the mesh and micro-batches of the fastest step that fits.

    Without a batch, one sequence for each chip.

    Raises:
      ValueError: if no mesh divides the model and the batch, or the topology is not known.
    """
    chip, devices = devices_of(config.topology, config.slices)
    chip = chip.at_peak() if config.peak else chip
    tokens = config.batch or len(devices) * shape.context
    if tokens % shape.context:
        raise ValueError(
            f"a batch of {tokens} tokens is no multiple of sequences of {shape.context}; give "
            f"{max(1, round(tokens / shape.context)) * shape.context}."
        )
    sizes = {"data": len(devices)}
    work = Work(shape, sizes, tokens, config.remat, fused_loss=config.fused_loss)
    params = shape.parameters()
    ratio = _bytes(jax.eval_shape(tx.init, params)) / _bytes(params)
    here, hosted = (0.0, ratio) if config.state_on_host else (ratio, 0.0)
    here += 2.0 if config.master_copy else 0.0
    network_of = lambda sizes: laid_out(chip, devices, sizes, config.slices)[1]
    stages = [1] if config.train_step else stages_of(shape, len(devices))
    found = candidates(*(work, here, network_of, config.slices), host_ratio=hosted, stages=stages)
    if not config.json:
        fitting = sum(candidate.fits for candidate in found)
        console.print(
            f"{len(found)} meshes of {len(devices)} chips, {_tried(config, shape, stages)}, divide "
            f"{config.model} and a step of {tokens:,} tokens; by hand, {fitting} of them fit. The "
            "fastest, and those that need least:"
        )
        print_whole(console, _table(found))
    best = found[0]
    return dataclasses.replace(
        config,
        mesh=best.mesh,
        batch=tokens,
        micro_batches=best.work.micro_batches,
        find_mesh=False,
    )


def _tried(config: "PlanConfig", shape: ModelShape, stages: list[int]) -> str:
    """Which numbers of pipeline stages, or why none."""
    if len(stages) > 1:
        return f"of {', '.join(map(str, stages[:-1]))} and {stages[-1]} pipeline stages"
    if config.train_step:
        return "without pipeline stages, which are tried only without --train-step"
    if "another" in against_stages(shape, 2):
        return "without pipeline stages, which need a model with one stack of layers"
    return "without pipeline stages, of which no number divides both layers and chips"


def _table(found: list[Candidate]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("mesh", no_wrap=True)
    for heading in (
        "micro-batches",
        "bubble",
        "memory",
        "fits",
        "sending ms",
        "step ms",
        "tokens/s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    least = sorted(found, key=lambda candidate: candidate.memory)
    shown = list(dict.fromkeys(map(id, found[:SHOWN] + least[: SHOWN // 2])))
    for candidate in found:
        if id(candidate) in shown:
            table.add_row(
                candidate.mesh,
                str(candidate.work.micro_batches),
                f"{candidate.waiting:.0%}" if candidate.work.size("stage") > 1 else "",
                readable(candidate.memory),
                "yes" if candidate.fits else "no",
                milliseconds(candidate.sending),
                milliseconds(candidate.seconds),
                thousands(candidate.work.tokens / candidate.seconds),
            )
    return table


def _bytes(tree: object) -> int:
    return sum(
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    )
