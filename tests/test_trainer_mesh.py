"""The trainer on meshes: losses as on one device, no double compilation, checkpoints across meshes."""

import contextlib
import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from jax.sharding import PartitionSpec as P
from ravine.training import train as loop
from ravine.training.cli import main
from ravine.training.compare import race as race_module
from ravine.training.compare.entrants import line_up
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig
from ravine.training.placed import place
from ravine.training.plan.collectives import collectives
from ravine.training.run.around import Hooks, RunPaths
from ravine.training.run.outcome import Outcome
from ravine.training.sharding import (
    batch_sharding,
    build_mesh,
    local_shards,
    parameter_shardings,
    role_spec,
)
from ravine.training.step import (
    abstract_state,
    init_params,
    make_loss,
    make_train_step,
)

from .run_rounding import furthest_loss, moved, rounding
from .tolerances import UNIT, furthest

pytestmark = pytest.mark.usefixtures("untimed")

MODEL = ModelConfig(width=16, layers=2, heads=2, context=8)
RUN = RunConfig(steps=8, batch_size=8, eval_every=4, eval_batches=2, model=MODEL)
MESHES = ("fsdp=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2")
compilations = 0


def _count(event, duration, **_):
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


def run(corpus, name, mesh, folder, on_record=lambda record: None, **options):
    """The records of a run with tuned hyperparameters, without fields that depend on the clock."""
    config = dataclasses.replace(RUN, **options)
    (entrant,) = line_up(name, "sophia_g=1e-3" if name == "sophia_g" else "")
    outcome = Outcome(name, entrant.learning_rate)
    hooks = Hooks(on_record=on_record)
    loop.train(config, entrant.build(config), corpus, outcome, RunPaths(folder), hooks, mesh)
    assert outcome.status == "finished"
    for record in (*outcome.steps, *outcome.evaluations):
        del record["seconds"]
    return outcome.steps + outcome.evaluations


@functools.cache
def on_one_device(corpus, name):
    with tempfile.TemporaryDirectory() as folder:
        return run(corpus, name, None, Path(folder))


@functools.cache
def tolerance(corpus, name):
    def again():
        with tempfile.TemporaryDirectory() as folder:
            return run(corpus, name, None, Path(folder))

    return rounding(again, on_one_device(corpus, name))


def mesh_of(text):
    """A mesh with as many devices as the text specifies."""
    sizes = [int(pair.split("=")[1]) for pair in text.split(",")]
    return build_mesh(text, jax.devices()[: math.prod(sizes)])


# Compilation dominates here, so Muon represents all optimizers: without matrices it is AdamW.
SLOW = [(name, mesh) for name in ("adamw", "muon", "shampoo") for mesh in MESHES]
SLOW = [*(case for case in SLOW if case != ("muon", MESHES[2])), ("sophia_g", MESHES[2])]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("muon", MESHES[2]), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_losses_are_those_of_one_device_and_nothing_is_compiled_twice(name, mesh, corpus, tmp_path):
    counts = []
    found = run(corpus, name, mesh_of(mesh), tmp_path, lambda _: counts.append(compilations))
    # Records: four steps and an evaluation, twice; the step is compiled before the first record.
    assert furthest_loss(found, on_one_device(corpus, name)) <= tolerance(corpus, name)
    assert len(counts) == 10
    assert counts[1] == counts[3]
    assert counts[4] == counts[9]


SAME = [MESHES[2], MESHES[2]]
OTHERS = [MESHES[2], "fsdp=4", "data=2", "data=1", MESHES[0]]


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("muon", SAME),
        *(pytest.param(name, SAME, marks=pytest.mark.slow) for name in ("adamw", "shampoo")),
        *(
            pytest.param(name, OTHERS, marks=pytest.mark.slow)
            for name in ("adamw", "muon", "shampoo")
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_a_run_goes_on_from_its_checkpoint_on_any_mesh(name, chain, corpus, tmp_path):
    """The run is interrupted at steps 1, 3, 5 ... and resumed on the next mesh."""
    for index, mesh in enumerate(chain):
        steps = []

        def on_record(record, last=2 * index + 1, steps=steps):
            steps.append(record["step"])
            if record["step"] == last and last < 2 * len(chain) - 1:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            found = run(corpus, name, mesh_of(mesh), tmp_path, on_record, checkpoint_every=1)
        assert steps[0] == max(0, 2 * index - 1)
    if len(set(chain)) == 1:
        folder = tmp_path / "whole"
        folder.mkdir()
        assert found == run(corpus, name, mesh_of(mesh), folder)
    assert furthest_loss(found, on_one_device(corpus, name)) <= tolerance(corpus, name)


def test_layers_are_gathered_one_at_a_time_and_logits_never():
    """The vocabulary is much larger than the rest and sharded by columns, the batch by rows."""
    model = ModelConfig(vocabulary=4096, width=16, layers=4, heads=2, context=8)
    mesh = build_mesh("fsdp=4,tensor=2")
    placed = place(model, ravine.sgd(0.1), mesh)
    tx, shardings = placed.tx, placed.shardings
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_state(model, tx, jnp.float32),
            shardings,
        )
        rows = batch_sharding(mesh, 128)
        batch = jax.ShapeDtypeStruct((128, 9), jnp.int32, sharding=rows)
        step = jax.jit(
            make_train_step(placed.graphdef, tx), out_shardings=(shardings, shardings.step)
        )
        found = collectives(step.lower(state, batch).compile().as_text())
    logits = 4 * (128 // 4) * 8 * (4096 // 2)  # on one device, sharded by rows and columns
    assert max(c.bytes for c in found) < logits / 4
    # The largest matrix of one layer, whole over fsdp and halved over tensor; all layers would be 4x.
    matrix = 4 * 16 * model.hidden // 2
    assert max(c.bytes for c in found if c.kind == "all-gather" and c.in_loop) == matrix


def test_roles_decide_how_parameters_are_cut():
    mesh = build_mesh(MESHES[2])
    _, params = jax.eval_shape(lambda: init_params(MODEL, 0))
    found = jax.tree.map(lambda s: s.spec, parameter_shardings(params, mesh))
    assert found["layers"]["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor")
    assert found["layers"]["feed_forward"]["down"]["kernel"] == P(None, "tensor", "fsdp")
    assert found["layers"]["attention_norm"]["scale"] == P()
    assert found["embed"]["embedding"] == P("tensor", "fsdp")
    assert found["head"]["kernel"] == P("fsdp", "tensor")
    assert role_spec("head/kernel", 2, ("data",)) == P(None, None)


def test_rows_follow_the_mesh():
    assert local_shards(batch_sharding(build_mesh(MESHES[2]), 8), 8) == ((0, 1, 2, 3), 4)
    assert local_shards(batch_sharding(build_mesh("tensor=8"), 8), 8) == ((0,), 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mesh", "data=3"], "the mesh data=3 has 3 devices, and there are 8"),
        (["--mesh", "fsdp=4,tensr=2"], "the mesh has no axis 'tensr'; did you mean tensor"),
        (
            ["--mesh", "data=8"],
            "batch_size 4 does not divide by the 8 devices of the mesh axes data",
        ),
        (
            ["--mesh", "tensor=8", "--width", "12", "--heads", "2"],
            "'layers/attention/key/kernel' of shape (1, 12, 12): axis 2 of 12 does not divide by the 8",
        ),
        (["--mesh", "data"], "give every mesh axis one size"),
        (
            ["--mesh", "data=2,context=4", "--context", "6"],
            "context 6 does not divide by the 4 devices of the mesh axis context",
        ),
        (["--coordinator", "here"], "coordinator must be host:port"),
        (["--coordinator", "a:1", "--processes", "2"], "process_id must lie in [0, 2), got -1"),
        (["--process-id", "1"], "need --coordinator"),
        (["--cpu-devices", "-1"], "cpu_devices must not be negative"),
    ],
)
def test_bad_meshes_and_launches_are_one_line_and_leave_nothing(
    words, expected, text, tmp_path, capsys
):
    small = ["--width", "16", "--layers", "1", "--heads", "2", "--context", "8"]
    shared = [*small, "--batch-size", "4", "--data", text]
    assert main(["race", *shared, "--out", str(tmp_path / "out"), *words]) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_resumed_race_may_change_its_mesh(text, tmp_path, capsys, monkeypatch):
    """Interrupted after its fifth step, it trains the remaining three on the new mesh."""
    words = ["race", "--optimizers", "muon", "--steps", "8", "--batch-size", "8"]
    words += ["--eval-every", "4", "--eval-batches", "2", "--out", str(tmp_path / "out")]
    words += ["--width", "16", "--layers", "2", "--heads", "2", "--context", "8"]
    words += ["--data", text]
    words += ["--checkpoint-every", "4"]
    train, steps, meshes = race_module.train, [], []

    def watched(run, tx, corpus, outcome, paths, hooks, mesh):
        def record(record):
            hooks.on_record(record)
            steps.append(record["step"])
            if len(meshes) == 1 and record["step"] == 4 and "loss" in record:
                raise KeyboardInterrupt

        meshes.append(mesh)
        changed = dataclasses.replace(hooks, on_record=record)
        return train(run, tx, corpus, outcome, paths, changed, mesh)

    monkeypatch.setattr(race_module, "train", watched)
    assert main(words) == 130
    steps.clear()
    assert main([*words, "--resume", "--mesh", "data=4,fsdp=2"]) == 0
    assert steps == [4, 5, 6, 7, 8]  # four steps and the evaluation after them
    assert dict(meshes[-1].shape) == {"data": 4, "fsdp": 2}
    assert main([*words, "--resume", "--seed", "1"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize("fused", [False, True])
def test_a_context_axis_changes_neither_loss_nor_gradient(fused):
    config = dataclasses.replace(MODEL, vocabulary=64, remat=True)
    graphdef, params = init_params(config, 0)
    loss = jax.value_and_grad(make_loss(graphdef, fused))
    batch = jax.random.randint(jax.random.key(0), (4, 9), 0, 64)
    program = jax.jit(loss)
    alone = program(params, batch)
    # Eight times the effect of rounding on one device, and at least 16 units, as in `run_rounding`.
    bound = 16 * UNIT
    for seed in range(3):
        rng = np.random.default_rng(seed)
        nearby = program(moved(params, rng), batch[rng.permutation(len(batch))])
        bound = max(bound, 8 * furthest(nearby, alone))
    mesh = build_mesh("data=2,context=2,tensor=2")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(params, mesh))
        batch = jax.device_put(batch, batch_sharding(mesh, 4))
        compiled = jax.jit(loss).lower(placed, batch).compile()
        together = compiled(placed, batch)
    assert furthest(together, alone) <= bound
    # Keys and values of whole sequences, [B, T, H, K] by rows and tensor, come from each of two devices.
    found = [c for c in collectives(compiled.as_text(), 8) if c.kind == "all-gather" and c.in_loop]
    assert {(c.bytes, c.group) for c in found} == {(2 * 8 * 1 * 8 * 4, (0, 2))}
    assert sum(c.times for c in found) == 2 * 2 * 2  # keys and values, layers, forward and backward
