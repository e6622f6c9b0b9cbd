"""The parts of the planner that need no TPU compiler: presets, shardings, plans, verdicts, bad input."""

import dataclasses
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import ravine
from jax.sharding import Mesh
from ravine.training.cli import _parse, main
from ravine.training.model import ModelConfig
from ravine.training.plan.by_hand import Work
from ravine.training.plan.chips import CHIPS
from ravine.training.plan.compile import (
    compiled_train_step,
    compiled_update,
    rows_for,
    trainer_model,
)
from ravine.training.plan.cost import Plan, plan_of
from ravine.training.plan.plan import ALIGNED, PlanConfig, assumed, plan
from ravine.training.plan.table import print_whole
from ravine.training.plan.verdict import verdict
from ravine.training.shapes.parts import Experts
from ravine.training.shapes.presets import PRESETS
from ravine.training.sharding import mesh_sizes, parameter_spec, sharded_parameters
from ravine.training.step import TrainState, init_params
from rich.console import Console
from rich.table import Table


def test_the_trainers_own_model_is_what_the_trainer_has():
    model, shape = ModelConfig(), PRESETS["ravine"]
    assert (model.layers, model.width, model.vocabulary) == (
        shape.layers,
        shape.width,
        shape.vocabulary,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_axis_that_is_sharded_divides(name):
    sizes = {"data": 2, "fsdp": 8, "tensor": 4}
    for path, x in PRESETS[name].parameters().items():
        spec = parameter_spec(path, x.shape, sizes)
        for size, axis in zip(x.shape, spec, strict=False):
            assert axis is None or size % sizes[axis] == 0
        if "layers/" in path and path.endswith("kernel"):
            assert sorted(filter(None, spec)) == ["fsdp", "tensor"]


def test_a_plan_of_what_is_compiled_here():
    devices = jax.devices()[:4]
    explicit = jax.sharding.AxisType.Explicit
    mesh = Mesh([devices[:2], devices[2:]], ("fsdp", "tensor"), axis_types=(explicit,) * 2)
    params = sharded_parameters(PRESETS["ravine"], mesh, layers_only=True)
    found = plan_of("adam", compiled_update(ravine.scale_by_adam(), params, mesh), mesh)
    assert found.parameters == sum(x.size for x in params.values()) * 2 // 4
    assert found.state == 4 * found.parameters + 4
    assert found.memory == 6 * found.parameters + 4 + found.temporary
    assert found.collectives == ()
    assert not found.repeated


def test_a_train_step_that_is_compiled_here():
    names = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = ModelConfig(vocabulary=64, context=8, width=16, layers=2, heads=2, remat=True)
    with jax.numpy_dtype_promotion("standard"):
        compiled = compiled_train_step(
            model, ravine.adamw(0.1), mesh, 8, 2, optimizer="adamw", fused=True
        )
        found = plan_of("adamw", compiled, mesh)
    # Matrices are in four parts with two bytes per element, and Adam keeps eight bytes.
    assert 3.9 <= found.state / found.parameters <= 4.1
    assert {c.kind for c in found.collectives} >= {"all-reduce", "all-gather"}


def test_a_planned_step_estimates_the_curvature_as_the_trainer_does(monkeypatch):
    """Hutchinson's estimate has negative entries, as the Hessian; that of all others is a square."""
    from ravine.training.plan import plan as planning

    planned, plan_of = [], planning.plan_of

    def kept(name, found, *rest, **options):
        planned.append(found)
        return plan_of(name, found, *rest, **options)

    monkeypatch.setattr(planning, "plan_of", kept)
    options = ["--optimizer", "sophia_h", "--options", '{"start": 0, "b2": 0.0}']
    assert main(["plan", *GPUS, "--train-step", *options]) == 0
    (found,) = planned
    model = trainer_model("ravine", PRESETS["ravine"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(model, 0)[1])
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found.state)
    batch = jnp.arange(4 * (model.context + 1), dtype=jnp.int32).reshape(4, -1) % model.vocabulary
    arguments = (TrainState(jnp.int32(0), params, opt_state), batch)
    arguments = jax.device_put(arguments, found.program.input_shardings[0])
    after, _ = found.program(*arguments)
    estimate = jax.tree.leaves(optax.tree.get(after.opt_state, "nu"))
    assert any(jnp.any(x < 0) for x in estimate)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gpt3-175b", "learned positions, biases"),
        ("gemma2-9b", "local attention, GEGLU"),
        ("t5-11b", "an encoder"),
        ("deepseek-v3", "a mixture of experts, latent attention"),
        ("olmo2-7b", "norms over all queries and keys"),
    ],
)
def test_a_model_that_the_trainer_cannot_build_is_refused(name, complaint):
    with pytest.raises(ValueError, match=f"{name} has .*{complaint}.*leave out --train-step"):
        trainer_model(name, PRESETS[name])


def test_a_tied_model_is_the_trainers_too():
    model, shape = trainer_model("llama3.2-1b", PRESETS["llama3.2-1b"]), PRESETS["llama3.2-1b"]
    params = jax.eval_shape(lambda: init_params(model, 0)[1])
    assert sum(x.size for x in jax.tree.leaves(params)) == shape.count
    shape = dataclasses.replace(shape, norms=4)
    params = jax.eval_shape(lambda: init_params(trainer_model("it", shape), 0)[1])
    assert sum(x.size for x in jax.tree.leaves(params)) == shape.count


def test_a_batch_that_is_not_a_whole_number_of_sequences():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    assert rows_for(0, 128, mesh) == 4
    assert rows_for(1024, 128, mesh) == 8
    with pytest.raises(ValueError, match="no multiple of 4 sequences of 128; give 1024"):
        rows_for(1000, 128, mesh)


GPUS = ["--model", "ravine", "--topology", "h100:8", "--mesh", "fsdp=4,tensor=2"]


def test_a_plan_for_gpus_is_printed(capsys):
    assert main(["plan", *GPUS, "--compare", "shampoo,muon,adamw"]) == 0
    printed = capsys.readouterr().out
    assert "No compiler for GPUs is at hand" in printed
    assert "shampoo: not the library's defaults" in printed
    assert "muon: not the library's defaults" not in printed
    assert printed.index(" adamw ") < printed.index(" muon ")  # the faster one first
    assert main(["plan", *GPUS, "--optimizer", "muon"]) == 0
    printed = capsys.readouterr().out
    assert "muon: fits in 80 GB" in printed
    assert "muon: 4 all-to-all sending" in printed


def test_a_narrow_console_cuts_no_number():
    console = Console(width=40, file=io.StringIO())
    table = Table("optimizer")
    for heading in ("state", "sum", "sent", "update", "step"):
        table.add_column(heading, no_wrap=True)
    table.add_row("adamw", *["123.45 GB"] * 5)
    print_whole(console, table)
    assert console.file.getvalue().count("123.45 GB") == 5
    assert console.width == 40


def test_a_model_given_by_its_sizes_is_planned(capsys):
    model = '{"like": "ravine", "layers": 2, "experts": {"count": 4, "per_token": 2, "width": 128}}'
    assert main(["plan", *GPUS[2:], "--model", model, "--optimizer", "adamw", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ravine_, experts = PRESETS["ravine"], Experts(4, 2, 128)
    shape = dataclasses.replace(ravine_, layers=2, experts=experts)
    assert found["model"]["parameters"] == shape.count


def test_a_train_step_assumes_nothing_of_attention(capsys):
    """Attention's products are counted with all others, at the same rate."""
    words = ["plan", *GPUS, "--optimizer", "adamw"]
    assert main(words) == 0
    assert "and attention at 35%" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--train-step"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "products at 80% of the published peak, memory and links" in printed


def test_every_registered_optimizer_is_one_of_all():
    assert PlanConfig(compare="all").names == ravine.names()


@pytest.mark.parametrize("name", ravine.names())
def test_every_optimizer_is_planned_as_it_runs_on_accelerators(name):
    """With blocks that no shard crosses, and otherwise with the library's defaults."""
    takes_blocks = ravine.OptimizerConfig(name).accepts("blocks")
    assert assumed(name, {}) == (ALIGNED if takes_blocks else {})
    assert assumed(name, {"blocks": None}) == {}


def test_on_gpus_newton_schulz_is_planned_in_bfloat16_as_it_runs_there():
    """Although XLA for CPU, where it runs in float32, stands in for their compiler."""

    def products(dtype):
        (found,) = plan(
            PlanConfig(
                model="ravine",
                topology="h100:8",
                mesh="fsdp=4,tensor=2",
                optimizer="muon",
                options=json.dumps({"polar": {"dtype": dtype}} if dtype else {}),
            ),
            Console(file=io.StringIO()),
        )
        return found.arithmetic.products

    assert products(None) == products("bfloat16") != products("float32")


@pytest.mark.parametrize("name", ["sophia_g", "mars", "schedule_free_adamw"])
def test_what_needs_more_than_gradients_is_planned(name, capsys):
    assert main(["plan", *GPUS, "--optimizer", name]) == 0
    assert f"{name}: fits in 80 GB" in capsys.readouterr().out


def test_json_has_what_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a Jupyter kernel
    assert main(["plan", *GPUS, "--optimizer", "adamw", "--json", "--micro-batches", "2"]) == 2
    capsys.readouterr()
    words = [*GPUS, "--optimizer", "adamw", "--json", "--micro-batches", "2", "--batch", "512"]
    assert main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    (adamw,) = found["plans"]
    sizes = adamw["bytes"]
    # Gradients in bfloat16 plus their float32 sums; two means in float32.
    assert sizes["gradients"] == 3 * sizes["parameters"]
    assert sizes["memory"] == pytest.approx(
        sizes["parameters"]
        + sizes["gradients"]
        + sizes["state"]
        + max(sizes["temporary"], sizes["activations"])
    )
    passed = 2 * sizes["parameters"] + sizes["parameters"] + 2 * sizes["state"]
    assert adamw["estimate"]["update"] == pytest.approx(passed / found["chip"]["bandwidth"])
    assert adamw["estimate"]["step"] == pytest.approx(
        adamw["estimate"]["update"] + adamw["estimate"]["model"] + adamw["estimate"]["exposed"]
    )
    assert adamw["fits"]


def test_a_state_on_the_host_is_moved_both_ways(capsys):
    words = ["plan", *GPUS, "--optimizer", "adamw", "--json"]
    found = []
    for flags in ([], ["--state-on-host"]):
        assert main([*words, *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    (here,), (there,) = (one["plans"] for one in found)
    state = here["bytes"]["state"]
    assert 0 < state - there["bytes"]["host"] <= 32  # everything but the counts
    held = there["bytes"]["memory"] - max(
        there["bytes"]["temporary"], there["bytes"]["activations"]
    )
    kept = sum(here["bytes"][x] for x in ("parameters", "gradients", "state"))
    assert held == kept - there["bytes"]["host"]
    # It comes to the chip and goes back; for GPUs this is computed by hand.
    staged = there["bytes"]["temporary"] - here["bytes"]["temporary"]
    assert staged == pytest.approx(1.5 * there["bytes"]["host"])
    moved = 2 * state / found[0]["chip"]["host"]
    assert there["estimate"]["update"] - here["estimate"]["update"] == pytest.approx(moved)


def test_a_master_copy_is_four_bytes_per_parameter(capsys):
    words = ["plan", *GPUS, "--optimizer", "adamw"]
    assert main([*words, "--json", "--master-copy"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes, chip = found["plans"][0]["bytes"], found["chip"]
    assert sizes["master"] == 2 * sizes["parameters"]
    held = sizes["parameters"] + sizes["master"] + sizes["gradients"] + sizes["state"]
    assert sizes["memory"] == held + max(sizes["temporary"], sizes["activations"])
    passed = 3 * sizes["parameters"] + 2 * sizes["state"] + 2 * sizes["master"]
    assert found["plans"][0]["estimate"]["update"] == pytest.approx(passed / chip["bandwidth"])
    assert main([*words, "--master-copy"]) == 0
    assert "master" in capsys.readouterr().out


def test_one_that_cannot_be_compiled_is_a_row_with_its_reason(capsys, monkeypatch):
    from ravine.training.plan import plan as planning

    def out_of_memory(tx, params, mesh, on_host):
        raise ValueError("Ran out of memory in memory space hbm. Used 100G of 16G hbm.")

    monkeypatch.setattr(planning, "compiled_update", out_of_memory)
    assert main(["plan", *GPUS, "--compare", "adamw,muon"]) == 0
    assert "muon: the program needs 100G of 16G memory." in capsys.readouterr().out


def planned(**sizes):
    return Plan("adamw", **{"parameters": 10**9, "gradients": 10**9, "state": 4 * 10**9, **sizes})


@pytest.mark.parametrize(
    ("found", "tokens", "says"),
    [
        (planned(), 4096, "fits in 16 GB with 10.00 GB to spare"),
        # State on the host is on the chip while it is being updated.
        (planned(state=15 * 10**9), 4096, "by 1.00 GB; shard over 2 times as many chips"),
        (planned(activations=11e9), 4096, "by 1.00 GB; with --state-on-host it does"),
        (planned(state=10**9, parameters=32 * 10**9), 4096, "shard over 3 times as many chips"),
        # For two sequences: 2.15 GB kept, 2.16 working memory, 2.10 for logits; for four, twice that.
        (planned(activations=14 * 10**9), 8 * 4096, "with --micro-batches 4 it does"),
        (planned(activations=10.5e9), 4096, "with --fused-loss it does"),
    ],
)
def test_verdicts_name_the_first_change_that_helps(found, tokens, says):
    work = Work(PRESETS["llama2-7b"], {"fsdp": 1}, tokens, fused_loss="host" in says)
    assert says in verdict(found, CHIPS["v5e"], work)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "llama2-71b"], "unknown model 'llama2-71b'"),
        (["--model", '{"like": "llama2-8b"}'], "unknown model 'llama2-8b'; did you mean llama"),
        (["--model", '{"layers": 2, "width": 64}'], "model lacks feed_forward, heads, vocabulary"),
        (["--model", '{"like": "ravine", "layers": 1.5}'], "layers must be a whole number"),
        (["--model", '{"like": "ravine", "heads": 0}'], "heads must be"),
        (["--model", "{layers"], "model must be a name or a JSON object"),
        (["--optimizer", "shampo"], "unknown optimizer 'shampo'; did you mean shampoo"),
        (["--mesh", "fsdq=8"], "the mesh has no axis 'fsdq'"),
        (["--mesh", "fsdp=8,fsdp=8"], "give every mesh axis one size"),
        (["--mesh", "fsdp=0"], "give every mesh axis one size"),
        (["--topology", "h100:some"], "unknown topology 'h100:some'"),
        (["--topology", "h100:16", "--mesh", "fsdp=16"], "needs as many virtual CPU devices"),
        (["--topology", "h100:8", "--mesh", "fsdp=4"], "h100:8 has 8 devices, and the mesh 4"),
        (["--topology", "h100:4", "--mesh", "fsdp=3", "--slices", "2"], "2 slices must divide"),
        (["--slices", "0"], "slices must be a whole number of at least 1, got 0"),
        ([*GPUS, "--batch", "1000"], "no multiple of 4 sequences of 64; give 1024"),
        (
            ["--topology", "h100:8", "--mesh", "stage=8", "--model", "ravine"],
            "8 stages do not divide 4",
        ),
        (
            ["--topology", "h100:2", "--mesh", "stage=2", "--model", "deepseek-v3"],
            "this model has another, of dense layers; leave out stage",
        ),
        (
            ["--topology", "h100:3", "--mesh", "context=3", "--model", "ravine"],
            "3 does not divide sequences",
        ),
        (
            [*GPUS[:4], "--mesh", "stage=2,fsdp=4", "--train-step"],
            "give --micro-batches 2 or a mul",
        ),
        ([*GPUS, "--micro-batches", "3"], "give --batch 768 or a multiple"),
        ([*GPUS, "--train-step", "--layers-only"], "leave out --layers-only"),
        ([*GPUS, "--train-step", "--remat", "none"], "give --remat products"),
        (
            [*GPUS, "--optimizer", "muon", "--options", '{"roles": []}'],
            "muon has no roles, so no parameter",
        ),
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; known: v4:8x8x8"),
        (["--options", "[1]"], "options must be a JSON object"),
        (["--options", "{"], "options must be a JSON object"),
        (["--options", json.dumps({"blok": 3})], "no hyperparameter 'blok'; did you mean blocks"),
    ],
)
def test_bad_input(words, complaint, capsys):
    assert len(jax.devices()) == 8  # JAX has started, so it is too late for more devices
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_missing_compiler_is_one_clear_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    assert main(["plan"]) == 2
    assert "pip install 'ravine[pods]'" in capsys.readouterr().err


def test_sizes_of_a_mesh():
    assert mesh_sizes("data=2, fsdp=4") == {"data": 2, "fsdp": 4}


def commands_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "pods.md").read_text()
    pattern = r"```\n\$ python -m ravine plan((?:[^\n]*\\\n)*[^\n]*)\n(.*?)```"
    return [
        (shlex.split(words.replace("\\\n", " ")), printed)
        for words, printed in re.findall(pattern, page, re.DOTALL)
    ]


@pytest.mark.parametrize(("words", "printed"), commands_of_the_page())
def test_commands_of_the_page_are_understood(words, printed):
    config = _parse(PlanConfig, "plan", words)
    assert config.model in PRESETS
    assert f"{config.model}: " in printed
    for name in config.names:
        assert name in printed
