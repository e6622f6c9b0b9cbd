"""Mixtures of experts on a mesh with an expert axis."""

import jax
import numpy as np
import pytest
import ravine
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from ravine.training.plan.by_hand import Work
from ravine.training.plan.compile import compiled_update, with_shardings
from ravine.training.plan.cost import bytes_per_device, plan_of
from ravine.training.shapes.parts import Experts
from ravine.training.shapes.presets import PRESETS
from ravine.training.shapes.shape import ModelShape
from ravine.training.sharding import parameter_shardings, parameter_spec, sharded_parameters

SHAPE = ModelShape(
    layers=2,
    width=256,
    feed_forward=512,
    heads=4,
    head_width=64,
    kv_heads=4,
    vocabulary=512,
    context=64,
    experts=Experts(4, 2, 256),
)

KERNELS = ("attention/query", "attention/output", "experts/up")


@pytest.fixture
def mesh():
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(devices, ("expert", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def experts(mesh):
    params = sharded_parameters(SHAPE, mesh, layers_only=True)
    return {name: x for name, x in params.items() if "experts/" in name}


def test_experts_are_cut_by_their_axis(mesh):
    specs = {x.sharding.spec for x in experts(mesh).values()}
    assert specs == {
        P(None, "expert", "fsdp", "tensor"),
        P(None, "expert", "tensor", "fsdp"),
    }
    sizes = dict(mesh.shape)
    assert parameter_spec("layers/shared_expert/up/kernel", (2, 8, 8), sizes) == P(
        None, "fsdp", "tensor"
    )
    # Three experts cannot be sharded over a mesh axis of size two.
    assert parameter_spec("layers/experts/up/kernel", (2, 3, 8, 8), sizes)[1] is None


def test_the_trainers_shardings_cut_experts_too(mesh):
    params = {"layers": {"experts": {"up": {"kernel": np.zeros((2, 4, 8, 8))}}}}
    found = parameter_shardings(params, mesh)["layers"]["experts"]["up"]["kernel"]
    assert found.spec == P(None, "expert", "fsdp", "tensor")
    params["layers"]["experts"]["up"]["kernel"] = np.zeros((2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"experts/up/kernel' of .*axis 1 of 3 does not divide by the 2 devices"
    ):
        parameter_shardings(params, mesh)


@pytest.mark.parametrize(
    "tx",
    [
        ravine.shampoo(0.1, blocks=ravine.Blocks(size=128)),
        ravine.soap(0.1, blocks=ravine.Blocks(size=128)),
        ravine.muon(0.1),
    ],
    ids=["shampoo", "soap", "muon"],
)
def test_nothing_is_exchanged_between_experts(tx, mesh):
    params = experts(mesh)
    found = plan_of("it", compiled_update(tx, params, mesh), mesh)
    # Positions 0 to 3 have the same experts. Muon exchanges rows and columns, others nothing.
    for c in found.collectives:
        assert set(c.group) <= {0, 1, 2, 3}
    assert not found.repeated


def test_copies_of_the_attention_share_its_blocks(mesh):
    """As in the plan for a mixture in docs/pods.md, SOAP exchanges nothing else."""
    whole = sharded_parameters(SHAPE, mesh, layers_only=True)
    params = {f"layers/{name}/kernel": whole[f"layers/{name}/kernel"] for name in KERNELS}
    soap, shampoo = (
        tx(0.1, blocks=ravine.Blocks(size=128)) for tx in (ravine.soap, ravine.shampoo)
    )
    found = plan_of("soap", compiled_update(soap, params, mesh), mesh)
    attention = 2 * 2 * 256 * 256 // 4
    # Of the two devices that hold a block, one sends its update; XLA for CPU sends it in float32.
    assert {(c.kind, c.group) for c in found.collectives} == {("all-gather", (0, 4))}
    assert found.sent == 4 * attention / 2
    # For each of the six blocks on a device, Shampoo has more than SOAP: a residual, a condition and two
    # counts per side, and one norm.
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(shampoo.init, params)
        state = with_shardings(shapes, ravine.state_shardings(shampoo, params))
    assert not found.repeated
    more = bytes_per_device(state) - found.state - 6 * 4 * (2 * 4 + 1)
    assert abs(more) <= 64  # bytes of counts and rates


def test_tokens_of_experts_by_hand():
    # Qwen 3 30B-A3B: 48 layers, 8 of 128 experts per token, width 2048; 16 shards of 4096 tokens each.
    shape = PRESETS["qwen3-30b-a3b"]
    work = Work(shape, {"expert": 16}, tokens=16 * 4096)
    sent = [c for c in work.exchanges() if c.kind == "all-to-all"]
    assert [(c.sent, c.times) for c in sent] == [(15 / 16 * 8 * 4096 * 2048 * 2, 48 * 6)]
    # Gradients of everything but the experts are summed over the shards.
    dense = 2 * (shape.count - 48 * 128 * 3 * 2048 * 768 - 48 * (2 * 2048 + 2 * 128) - 2048)
    (copies,) = (c for c in work.exchanges() if c.kind == "all-reduce")
    assert copies.sent == 2 * 15 / 16 * dense
    # Each token passes through eight experts of width 768.
    keys = shape.kv_heads * shape.head_width
    elements = 4 * 2048 + 2 * 32 * 128 + 2 * keys + 3 * 8 * 768
    assert work.activations()["at work"] == 2 * 2 * 4096 * elements
