"""Times and costs of the model, against numbers worked out by hand."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ravine.training.plan.by_hand import Work
from ravine.training.plan.chips import CHIPS
from ravine.training.plan.collectives import Collective, collectives
from ravine.training.plan.flops import Product, arithmetic
from ravine.training.plan.model_time import exposed_seconds, imbalance, model_seconds
from ravine.training.plan.network import Network
from ravine.training.plan.roofline import Estimate, passed_over, seconds_of, sent_in
from ravine.training.shapes.presets import PRESETS

from .tolerances import HALF

GOLDEN = Path(__file__).parent / "golden"
V5P, V5E, H100 = (CHIPS[name].at_peak() for name in ("v5p", "v5e", "h100"))
LLAMA = PRESETS["llama2-7b"]


def torus(chip, *shape, slices=1):
    places = [(s,) for s in range(slices)]
    for size in shape:
        places = [(*place, x) for place in places for x in range(size)]
    return Network(chip, tuple(places))


def collective(kind, size, group, sent=0.0):
    return Collective(kind, round(size), sent, group=tuple(group))


CUBE = torus(V5P, 4, 4, 4)
NODES = Network.of(H100, range(16))


@pytest.mark.parametrize(
    ("network", "found", "seconds"),
    [
        # A ring of four: three quarters of 1 GB over two links of 100 GB/s.
        (CUBE, collective("all-gather", 1e9, range(4)), 0.75 / 200),
        # A plane of sixteen has four links, and the whole cube six.
        (CUBE, collective("all-gather", 1e9, range(16)), 15 / 16 / 400),
        (CUBE, collective("all-gather", 1e9, range(64)), 63 / 64 / 600),
        # For a reduce-scatter, the bytes are those that are kept.
        (CUBE, collective("reduce-scatter", 1e9, range(4)), 4 * 0.75 / 200),
        (CUBE, collective("all-reduce", 1e9, range(4)), 2 * 0.75 / 200),
        # Half of a dimension is a line with a single link.
        (CUBE, collective("all-gather", 1e9, (0, 1)), 0.5 / 100),
        # In a v5e, four chips of 16 do not close to a ring; all sixteen do.
        (torus(V5E, 16, 16), collective("all-gather", 1e9, range(4)), 0.75 / 50),
        (torus(V5E, 16, 16), collective("all-gather", 1e9, range(16)), 15 / 16 / 100),
        # A slice smaller than a cube of a v5p has no rings.
        (torus(V5P, 2, 2, 4), collective("all-gather", 1e9, range(4)), 0.75 / 100),
        # All-to-all in a ring of four: half of a chip's 1 GB crosses the middle, by two links of two.
        (CUBE, collective("all-to-all", 1e9, range(4)), 0.5 / 100),
        (torus(V5P, 8, 4, 4), collective("ragged-all-to-all", 1e9, range(0, 128, 16)), 1 / 100),
        (CUBE, collective("collective-permute", 1e9, (0, 1), sent=1e9), 1 / 100),
        # Two slices: half of the data on a chip crosses, at 6.25 GB/s.
        (
            torus(V5P, 4, 4, 4, slices=2),
            collective("all-reduce", 1e9, (0, 64)),
            2 * 0.5 / 6.25,
        ),
        (
            torus(V5P, 4, 4, 4, slices=2),
            collective("all-reduce", 1e9, range(128)),
            2 * (63 / 64 / 600 + 0.5 / 64 / 6.25),
        ),
        # Within a node through a switch; between two nodes, each of eight cards sends an eighth.
        (NODES, collective("all-gather", 1e9, range(8)), 7 / 8 / 450),
        (NODES, collective("all-gather", 1e9, range(16)), 7 / 8 / 450 + 1 / 16 / 50),
        (NODES, collective("all-to-all", 1e9, range(8)), 7 / 8 / 450),
        (NODES, collective("all-to-all", 1e9, (0, 8)), 0.5 / 50),
        (NODES, collective("collective-permute", 1e9, (7, 8), sent=1e9), 1 / 50),
        (CUBE, collective("all-reduce", 1e9, (3,)), 0.0),
    ],
)
def test_seconds_of_collectives(network, found, seconds):
    assert network.seconds(found) == pytest.approx(seconds, rel=HALF)


def test_rates_of_products():
    assert V5P.seconds("bfloat16", 459e12) == 1.0
    assert V5P.seconds("float32:highest", 459e12) == pytest.approx(6.0)
    assert V5P.seconds("float32:high", 459e12) == pytest.approx(3.0)
    assert H100.seconds("float32:highest", 67e12) == 1.0
    assert V5P.seconds("bfloat16", 1.0, 2.765e12) == 1.0
    assert V5P.seconds("decomposition", 459e12 / 6) == pytest.approx(100.0)


@pytest.mark.parametrize("name", CHIPS)
def test_chips_have_their_published_figures(name):
    chip = CHIPS[name]
    assert all(source.startswith("https://") for source in chip.sources)
    assert chip.network < chip.link < chip.bandwidth < chip.products["float32:highest"]
    assert bool(chip.node) != bool(chip.wraps)
    assert 0.3 <= chip.attention <= chip.reached < 1


def test_products_are_told_apart():
    def program(x, y):
        for precision in (None, "high", "highest"):
            x = jnp.dot(x, x, precision=precision)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.linalg.eigh(x)[1], lambda x: x, x)
        return jax.lax.fori_loop(0, 5, lambda _, z: z @ y, x.astype(jnp.bfloat16))

    found = arithmetic(jax.jit(program).trace(jnp.ones((8, 8)), jnp.ones((8, 8), jnp.bfloat16)), 1)
    each = Product("float32", 2 * 8**3, 3 * 8 * 8 * 4)
    assert found.products[each] == 1
    assert found.products[each._replace(kind="float32:high")] == 1
    assert found.products[each._replace(kind="float32:highest")] == 1
    assert found.products[each._replace(kind="bfloat16", moved=3 * 8 * 8 * 2)] == 5
    assert {product.kind for product in found.more_products} == {"decomposition"}
    # Three products on tensor cores and one without; all are read from and written to memory.
    assert seconds_of(NODES, found.products) == pytest.approx(
        max(each.operations / 494.5e12, each.moved / 3.35e12) * 2
        + max(each.operations / 67e12, each.moved / 3.35e12)
        + 5 * max(each.operations / 989e12, each.moved / 2 / 3.35e12)
    )


def test_one_pass_over_memory():
    # Parameters and state both ways, gradients one way: 2 + 1 + 8 bytes.
    assert passed_over(CUBE, 1, 1, 4) == pytest.approx(11 / 2.765e12)


def test_an_estimate_adds_up():
    found = Estimate(0.1, 0.1, 5.0, model=0.7, exposed=0.1, tokens=10, useful=0.5)
    assert found.step == pytest.approx(1.0)
    assert found.share == pytest.approx(0.2)
    assert found.mfu == pytest.approx(0.5)
    assert found.tokens_per_second == pytest.approx(10)


def test_activations_by_hand():
    # One sequence of 4096 tokens in each of four shards, width 4096, 32 heads of 128, tensor axis of 2.
    full = Work(LLAMA, {"fsdp": 4, "tensor": 2}, tokens=4 * 4096)
    stream = 4096 * 4096 * 2
    none = 2 * 4096 * (4 * 4096 + (4 * 4096 + 3 * 11008) // 2)
    assert full.activations() == {
        "kept": 32 * stream,
        "at work": 2 * none,
        "logits": 8 * 4096 * 32000 / 2,
    }
    held = Work(LLAMA, {"fsdp": 4, "tensor": 2}, tokens=4 * 4096, remat="none")
    assert held.activations() == {
        "kept": 32 * none,
        "at work": none,
        "logits": 8 * 4096 * 32000 / 2,
    }
    kept = Work(LLAMA, {"fsdp": 4, "tensor": 2}, tokens=4 * 4096, remat="products")
    products = 2 * 4096 * (3 * 4096 + (3 * 4096 + 2 * 11008) // 2)
    assert kept.activations()["kept"] == 32 * products
    halved = Work(
        LLAMA, {"fsdp": 4, "tensor": 2}, tokens=8 * 4096, micro_batches=2, fused_loss=True
    )
    assert halved.activations()["kept"] == 32 * stream
    assert halved.activations()["logits"] == full.activations()["logits"] / 64
    # Float32 sums beside bfloat16 gradients.
    assert (full.accumulators(100), halved.accumulators(100)) == (0, 200)


def test_seconds_of_the_model_by_hand():
    # 4096 tokens on each of four row shards, split once more by the tensor axis.
    work = Work(LLAMA, {"fsdp": 4, "tensor": 2}, tokens=4 * 4096, remat="none")
    scores = 6 * 32 * 32 * (2 * 128) * 4097 / 2 * 4096 / 2
    products = LLAMA.flops() * 4096 / 2 - scores
    elements = 8 * 4096 + (2 * 64 * 128 + 3 * 11008) / 2
    moved = 4096 * (3 * 32 * 2 * elements + 16 * 32000 / 2)
    found = products / 989e12 / 0.8 + 3.5 / 3 * scores / 989e12 / 0.35 + moved / 3.35e12
    assert model_seconds(work, CHIPS["h100"]) == pytest.approx(found)
    full = dataclasses.replace(work, remat="full")
    more = products / 3 / 989e12 + scores / 3 / 989e12 + 4096 * 32 * 2 * elements / 3.35e12
    assert model_seconds(full, H100) - model_seconds(work, H100) == pytest.approx(more)


PUBLIC = [
    # Chip, mesh, tokens, and the published tokens per second per chip or MFU; sources in docs/pods.md.
    ("llama3-8b", "h100", 8, 2 * 8192, 6667, "tokens"),
    ("llama2-70b", "v5p", 64, 4 * 4096, 0.65, "mfu"),
    ("llama2-70b", "v4", 64, 4 * 4096, 0.57, "mfu"),
    ("llama2-70b", "v5e", 256, 4 * 4096, 0.57, "mfu"),
]


@pytest.mark.parametrize("remat", ["full", "products", "none"])
@pytest.mark.parametrize(("model", "chip", "chips", "tokens", "published", "unit"), PUBLIC)
def test_estimates_are_within_twice_of_public_runs(
    model, chip, chips, tokens, published, unit, remat
):
    work = Work(PRESETS[model], {"fsdp": chips}, tokens * chips, remat)
    seconds = model_seconds(work, CHIPS[chip])
    peak = work.operations(recomputed=False) / CHIPS[chip].products["bfloat16"]
    found = peak / seconds if unit == "mfu" else tokens / seconds
    assert 1 <= found / published <= 2


def test_a_pipeline_by_hand():
    # Eight stages of four layers; sixteen micro-batches of one sequence each.
    sizes = {"stage": 8, "fsdp": 2}
    piped = Work(LLAMA, sizes, tokens=2 * 16 * 4096, micro_batches=16)
    stream = 4096 * 4096 * 2
    # The last stage needs most memory, for its logits; with a fused loss the first does,
    # because it keeps eight micro-batches.
    last = piped.activations()
    assert (last["kept"], last["logits"]) == (4 * stream, 8 * 4096 * 32000)
    fused = dataclasses.replace(piped, fused_loss=True)
    first = fused.activations()
    assert (first["kept"], first["logits"]) == (8 * 4 * stream, 0)
    # The last stage computes the whole head, 1/8 of which is in the mean over all stages.
    flat = dataclasses.replace(fused, sizes={"fsdp": 16})
    head = 4 / 3 * 6 * 32000 * 4096 * 16 * 4096 / 989e12
    mean = model_seconds(flat, H100)
    last, other = mean + 7 / 8 * head, mean - head / 8
    assert model_seconds(fused, H100) == pytest.approx(last + 7 / 16 * other)
    sending = exposed_seconds(fused, H100, last + 0.1)
    assert sending == pytest.approx(0.1 * (16 + 7) / 16)
    assert exposed_seconds(fused, H100, last) == pytest.approx(0, abs=HALF * last)
    (sent,) = (c for c in piped.exchanges() if c.kind == "collective-permute")
    assert (sent.sent, sent.times, sent.group) == (stream, 2 * 16, tuple(range(0, 16, 2)))
    # The two-way sharded copies of embedding and head add up their gradients once.
    (ends,) = (c for c in piped.exchanges() if c.kind == "all-reduce")
    assert (ends.sent, ends.times) == (7 / 8 * 2 * 2 * 2 * 32000 * 4096 / 2, 1)
    assert ends.group == sent.group
    layers = LLAMA.count - 65 * 4096 - 2 * 32000 * 4096
    gathered = [c.sent for c in piped.exchanges() if c.kind == "all-gather"]
    assert gathered == [0.5 * 2 * (layers / 8 + 2 * 32000 * 4096)] * 2


def test_a_context_axis_by_hand():
    # A sequence of 4096 tokens on four chips, in each of two row shards.
    work = Work(LLAMA, {"fsdp": 2, "context": 4}, tokens=2 * 4096)
    assert (work.rows, work.sequences) == (1024, 1)
    assert work.activations()["kept"] == 32 * 1024 * 4096 * 2
    # Working memory also holds keys and values of the three other parts, and again their gradients.
    none = 2 * 1024 * (4 * 4096 + 4 * 4096 + 3 * 11008)
    others = 2 * 3 * 1024 * (2 * 32 * 128)
    assert work.activations()["at work"] == 2 * none + 2 * others
    held = dataclasses.replace(work, remat="none").activations()
    assert (held["kept"], held["at work"]) == (32 * none, none + 2 * others)
    found = [c for c in work.exchanges() if c.group == (0, 1, 2, 3)]
    gathered = 2 * 4096 * (2 * 32 * 128)  # keys and values of the whole sequence
    kinds = [(c.kind, c.sent, c.times) for c in found]
    assert kinds[1:] == [
        ("all-gather", 0.75 * gathered, 32),
        ("all-gather", 0.75 * gathered, 32),
        ("reduce-scatter", 0.75 * gathered, 32),
    ]
    assert kinds[0] == ("all-reduce", 1.5 * (LLAMA.count - 65 * 4096), 1)  # gradients of the copies


def test_the_last_part_of_a_sequence_has_most_keys():
    work = Work(LLAMA, {"fsdp": 2, "context": 4}, tokens=2 * 4096)
    # The last 1024 of 4096 queries see 3073 to 4096 keys; all see 1 to 4096: 7/4 of the mean.
    last, mean = 1024 * (3073 + 4096) / 2, 4096 * 4097 / 2 / 4
    assert imbalance(work) == pytest.approx(last / mean)
    assert last / mean == pytest.approx(7 / 4, rel=1 / 4096)  # without the diagonal
    flat = dataclasses.replace(work, sizes={"fsdp": 8})
    assert imbalance(flat) == 1
    # Queries times keys and scores times values in 32 layers: 2 forward, 2 repeated, and 5 backward.
    more = 9 * 32 * 32 * 2 * 128 * (last - mean)
    assert model_seconds(work, H100) - model_seconds(flat, H100) == pytest.approx(more / 989e12)
    # With a window of 1024 tokens, only the first queries see fewer keys.
    local = dataclasses.replace(LLAMA, window=1024, local_layers=32)
    expected = 4 * 1024 * 1024 / (1024 * 1025 / 2 + 3072 * 1024)
    assert imbalance(dataclasses.replace(work, shape=local)) == pytest.approx(expected)
    # In an encoder, all tokens see each other: of three attentions over 512 tokens, one is causal.
    t5 = dataclasses.replace(work, shape=PRESETS["t5-11b"])
    causal = 513 / 2 / (513 / 2 + 2 * 512)
    assert imbalance(t5) == pytest.approx(1 + 3 / 4 * causal, rel=1 / 512)  # without the diagonal


def test_exchanges_by_hand():
    work = Work(LLAMA, {"data": 2, "fsdp": 4, "tensor": 2}, tokens=8 * 4096)
    found = work.exchanges()
    matrices = 2 * (LLAMA.count - 65 * 4096) / 2  # bytes of one tensor shard, without norms
    assert [c.sent for c in found if c.kind == "all-gather"] == [0.75 * matrices] * 2
    assert [c.sent for c in found if c.kind == "reduce-scatter"] == [0.75 * matrices]
    copies, stream = (c for c in found if c.kind == "all-reduce")
    assert (copies.sent, copies.group) == (matrices / 4, (0, 8))
    assert (stream.sent, stream.times, stream.group) == (4096 * 4096 * 2, 5 * 32 + 2, (0, 1))


def test_the_compiled_step_of_llama_is_what_is_counted_by_hand():
    found = collectives((GOLDEN / "llama2_7b_step.txt").read_text(), 8)
    by_hand = Work(LLAMA, {"fsdp": 4, "tensor": 2}, tokens=4 * 4096).exchanges()

    def sent(found, *kinds):
        return sum(c.total for c in found if c.kind in kinds)

    # The estimate may be off by a tenth (docs/log.md). The whole difference is explained here.
    assert sum(c.total for c in found) == pytest.approx(sum(c.total for c in by_hand), rel=0.1)
    norms, width, tokens = 65, 4096, 4096
    square, embedding = (0.75 * 2 * rows * width / 2 for rows in (width, LLAMA.vocabulary))
    # FSDP: the compiler gathers the query, key and value matrices a third time and pads their gradients
    # by 1/64; it gathers embedding and head once, and does not scatter the embedding's gradient.
    fsdp = ("all-gather", "reduce-scatter")
    more = 3 * LLAMA.layers * square * (1 + 1 / 64) - 3 * embedding
    assert sent(found, *fsdp) == sent(by_hand, *fsdp) + more
    # Sums over the tensor axis, and gradients of the embedding and the norms; for each token the largest
    # logit, the sum of exponentials and the target's logit; and scalars.
    more = 2 * embedding + 1.5 * 2 * norms * width + (1 + 1 + 1) * 4 * tokens
    assert 0 < sent(found, "all-reduce") - sent(by_hand, "all-reduce") - more < 100
    assert all(c.times in (1, LLAMA.layers) for c in found)


def test_collectives_run_one_after_the_other():
    found = [collective("all-gather", 1e9, range(4))] * 2
    assert sent_in(CUBE, found) == pytest.approx(2 * 0.75 / 200)


def test_groups_are_read():
    text = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %a = f32[4]{0} all-reduce(%x), replica_groups=[2,4]<=[4,2]T(1,0)
  %b = f32[4]{0} all-reduce(%x), replica_groups=[4,2]<=[8]
  %c = f32[4]{0} all-reduce(%x), replica_groups={{0,3},{1,2}}
  %d = f32[4]{0} all-reduce(%x), replica_groups={}
  %f = f32[4]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}
  %g = f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%add
  %h = f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  ROOT %e = f32[4]{0} collective-permute(%x), source_target_pairs={{1,1},{2,5}}
}
"""
    groups = [c.group for c in collectives(text, 8)]
    last = [(0, 2), (0, 2, 4, 6), (0, 1), (2, 5)]
    assert groups == [(0, 2, 4, 6), (0, 1), (0, 3), tuple(range(8)), *last]
