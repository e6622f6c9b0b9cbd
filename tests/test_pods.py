"""The optimizers compiled by the TPU's own compiler for pods that are not present: `make test-pods`."""

import json

import jax
import pytest
import ravine
from ravine.training.plan.by_hand import Work
from ravine.training.plan.compile import auto
from ravine.training.plan.cost import plan_of
from ravine.training.plan.devices import mesh_of
from ravine.training.plan.plan import PlanConfig, plan
from ravine.training.shapes.parts import Experts
from ravine.training.shapes.presets import PRESETS
from ravine.training.shapes.shape import ModelShape
from rich.console import Console

from .mixture import compiled_step

pytestmark = [
    pytest.mark.pods,
    # libtpu warns on import when it finds no TPU.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SCALARS = 64
"""Bytes at most of what an optimizer has one of: counts and rates."""
LLAMA = {"model": "llama2-70b", "topology": "v5p:8x8x8", "mesh": "fsdp=64,tensor=8"}


@pytest.fixture(autouse=True)
def promotion():
    """The promotion setting that users have."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def planned(optimizer, **overrides):
    config = PlanConfig(**{**LLAMA, "optimizer": optimizer, "layers_only": True, **overrides})
    return plan(config, Console(quiet=True))[0]


def test_element_wise_optimizers_communicate_nothing():
    found = planned("adamw")
    assert found.collectives == ()
    # Two float32 means for bfloat16 parameters.
    assert 0 < found.state - 4 * found.parameters <= SCALARS


@pytest.mark.parametrize(
    ("optimizer", "options", "numbers", "limit"),
    [
        # For each block of 128: statistics, and roots or bases, for both sides. When packed,
        # each has n (n + 1) / 2 elements. Shampoo also has a residual, a condition and two counts per
        # side, and one norm for the block.
        ("shampoo", {"factors": {"packed": True}}, 2 * (2 * 128 * 129 // 2 + 4) + 1, 3.5e9),
        ("soap", {}, 2 * 2 * 128**2, 3.9e9),
    ],
)
def test_aligned_blocks_are_not_communicated_and_fit(optimizer, options, numbers, limit):
    found = planned(optimizer, options=json.dumps(options))
    assert found.collectives == ()
    assert not found.repeated
    # Two float32 means for bfloat16 parameters, plus the numbers kept for each block.
    blocks = found.parameters // (2 * 128**2)
    assert 0 < found.state - 4 * found.parameters - 4 * numbers * blocks <= SCALARS
    assert found.state + found.temporary <= limit


def test_muon_exchanges_whole_matrices_outside_of_loops():
    found = planned("muon")
    assert {c.kind for c in found.collectives} == {"ragged-all-to-all"}
    assert sum(c.bytes for c in found.collectives) <= 2.2 * found.parameters
    assert not any(c.in_loop for c in found.collectives)
    assert found.temporary <= 4e9
    # Every chip holds a part of every matrix.
    assert not found.repeated


@pytest.mark.parametrize(
    ("model", "topology", "mesh"),
    [
        ("llama2-7b", "v5e:16x16", "fsdp=32,tensor=8"),
        ("llama2-7b", "v6e:16x16", "data=2,fsdp=16,tensor=8"),
        ("gpt3-175b", "v5p:16x16x24", "fsdp=768,tensor=8"),
    ],
)
def test_other_chips_and_models(model, topology, mesh):
    assert planned("adamw", model=model, topology=topology, mesh=mesh).collectives == ()


def test_a_train_step_of_the_trainers_own_model():
    small = {"model": "ravine", "topology": "v5e:4x4", "mesh": "data=2,fsdp=4,tensor=2"}
    found = planned("adamw", **small, layers_only=False, train_step=True)
    assert {"all-reduce", "all-gather"} <= {c.kind for c in found.collectives}
    # Two float32 means for bfloat16 parameters.
    assert 0 < found.state - 4 * found.parameters <= SCALARS


def test_a_state_on_the_host_is_compiled_to_stay_there():
    small = {"model": "llama3.2-1b", "topology": "v5e:4x4", "mesh": "fsdp=16"}
    here, there = (planned("adamw", **small, state_on_host=on_host) for on_host in (False, True))
    assert there.host == 4 * here.parameters
    assert 0 < here.state - there.host <= SCALARS
    # The state is on the chip during the update, and some of it twice: on its way in and on its way out.
    assert here.state <= there.temporary - here.temporary <= 2.5 * here.state


def test_mesh_that_does_not_match():
    with pytest.raises(ValueError, match=r"v5e:4x4 has 16 devices, and the mesh 8"):
        planned("adamw", topology="v5e:4x4", mesh="fsdp=8")


def test_unknown_chips():
    with pytest.raises(ValueError, match=r"unknown topology 'v5e:3x5x7' .*known: v4:8x8x8"):
        planned("adamw", topology="v5e:3x5x7")


def test_a_train_step_in_stages_sends_what_is_counted_by_hand():
    stages, fsdp, micro = 4, 4, 8
    small = {"model": "ravine", "topology": "v5e:4x4", "mesh": f"stage={stages},fsdp={fsdp}"}
    options = {"layers_only": False, "train_step": True, "micro_batches": micro, "batch": 2048}
    found = planned("adamw", **small, **options)
    shape = PRESETS["ravine"]
    # The bfloat16 residual stream of one sequence, forward and backward at every tick, from three of
    # four stages. Then the last stage distributes its result to the others and receives the gradient.
    stream, ticks = 2 * shape.context * shape.width, micro + stages - 1
    sent = 2 * (ticks + micro / stages) * stream * (stages - 1) / stages
    between = [c for c in found.collectives if len({at // fsdp for at in c.group}) > 1]
    permuted = [c for c in between if c.kind == "collective-permute"]
    assert sum(c.total for c in permuted) == sent
    assert {c.times for c in permuted if c.in_loop} == {ticks}
    # Every stage has a copy of the embedding, the head and the last norm, and their bfloat16 gradients
    # are summed, and so are two float32 numbers: 8 bytes.
    ends = 2 * (2 * shape.vocabulary / fsdp + 1) * shape.width + 8
    summed = sum(c.total for c in between if c.kind == "all-reduce" and len(c.group) == stages)
    assert summed == 2 * ends * (stages - 1) / stages


MIXTURE = ModelShape(
    layers=2,
    width=512,
    feed_forward=512,
    heads=4,
    head_width=128,
    kv_heads=4,
    vocabulary=512,
    context=256,
    experts=Experts(8, 2, 512),
)


def test_a_train_step_of_a_mixture_exchanges_tokens_by_hand_and_no_experts():
    sizes = {"expert": 8, "fsdp": 2}
    mesh, _ = mesh_of("v5e:4x4", sizes)
    rules = [ravine.Rule("attention/", "other"), *ravine.COMMON_RULES]
    tx = ravine.muon(1e-3, rules=rules)
    found = plan_of("muon", compiled_step(MIXTURE, tx, auto(mesh), 16), mesh, is_step=True)
    between = [c for c in found.collectives if len({at // 2 for at in c.group}) > 1]
    # In the forward, repeated forward and backward pass of each of two layers, tokens go to their
    # experts and come back: for two experts per token, seven eighths on other chips, 512 elements of two
    # bytes.
    sent = sum(c.total for c in between if c.kind == "all-to-all")
    assert sent == 2 * 6 * 256 * 2 * 7 / 8 * 512 * 2
    by_hand = Work(MIXTURE, sizes, 16 * 256).exchanges()
    assert sent == sum(c.total for c in by_hand if c.kind == "all-to-all")
    # Everything else sent across the expert axis is a sum of gradients of replicated parameters.
    assert {c.kind for c in between} == {"all-to-all", "all-reduce"}
    # Muon exchanges rows and columns of the six matrices of each expert, each split between two chips.
    (whole, back) = (c for c in found.collectives if c.kind == "all-to-all" and c not in between)
    assert whole.bytes == back.bytes == 6 * 512 * 512 // 2 * 2
