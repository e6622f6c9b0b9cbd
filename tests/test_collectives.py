"""What a program communicates: read from the output of two compilers, and counted by hand."""

import json
from pathlib import Path

import pytest
from ravine.training.plan.collectives import KINDS, collectives
from ravine.training.plan.hlo import Program

TEXTS = json.loads((Path(__file__).parent / "golden" / "hlo.json").read_text())
DEVICES = {"tpu": 16, "cpu": 8}
BLOCK = 256 * 512 * 4  # bytes on each device; groups have four devices
SENT = {
    "all-gather": 3 * BLOCK,  # a quarter of [1024, 512] is local; three come and go
    "reduce-scatter": 3 * BLOCK,
    "all-reduce": 2 * 3 / 4 * BLOCK,
    "all-to-all": 3 / 4 * BLOCK,
    "collective-permute": BLOCK,
    "ragged-all-to-all": 3 / 4 * BLOCK,
}
TIMES = {"plain": 1, "loop": 7, "nested": 15, "scan": 12, "branch": 1}


@pytest.mark.parametrize("name", TEXTS)
def test_bytes_are_those_counted_by_hand(name):
    platform, kind, form = name.split("/")
    found = collectives(TEXTS[name], DEVICES[platform])
    assert sum(c.total for c in found) == SENT[kind] * TIMES[form]
    assert {c.always for c in found} == {form != "branch"}
    assert {c.in_loop for c in found} == {form in ("loop", "nested", "scan")}
    assert {c.times for c in found} == {TIMES[form]}
    if platform == "tpu":
        assert {c.kind for c in found} == {kind}


def test_every_kind_has_its_texts():
    for kind in KINDS:
        assert sum(name.split("/")[:2] == ["tpu", kind] for name in TEXTS) >= 5


WRITTEN = """
%inner (p: f32[4]) -> f32[4] {
  %r = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %s = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = f32[4]{0} fusion(%p), calls=%inner
}
%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %unknown = pred[] custom-call(%p)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%x), condition=%condition, body=%body
  %g = ((f32[4], f32[2]), (f32[16], f32[8])) all-gather-start(%x, %z), replica_groups={{0,1,2,3}}
  %t = (f32[4], f32[4], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0},{2,2}}
  %f = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %y = s8[8]{0} all-to-all(%x), replica_groups={}
}
"""


def test_forms_that_compilers_write():
    found = {c.kind: c for c in collectives(WRITTEN, devices=8)}
    # In a loop of unknown length: counted once, and excluded from the operations that always happen.
    summed = found["all-reduce"]
    assert (summed.sent, summed.times, summed.always) == (2 * 3 / 4 * 32, 1, False)
    assert summed.in_loop
    # In asynchronous starts, operands come before results, and counters after them.
    assert found["all-gather"].sent == 3 / 4 * 96
    # Two of the eight devices send data to another one.
    assert found["collective-permute"].sent == 2 / 8 * 16
    # A slice of a sum: eight of thirty-two bytes are kept.
    assert (found["reduce-scatter"].bytes, found["reduce-scatter"].sent) == (8, 24)
    # Where the text lists no groups, one group contains all devices.
    assert found["all-to-all"].sent == 7 / 8 * 8


CONTINUED = """
%started (p: f32[4]) -> f32[32] {
  %g.1 = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=[2,8]<=[16]
}
%async_collective_fusion.2 (p: f32[4], c: u32[]) -> f32[32] {
  %m = f32[8,8]{1,0} convolution(%a, %b)
  %g.2 = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=[2,8]<=[16]
}
%ended (p: f32[4], c: u32[]) -> f32[32] {
  %g.3 = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=[2,8]<=[16]
}
ENTRY %main (x: f32[4]) -> f32[32] {
  %async-collective-start.1 = (f32[4], f32[32], u32[]) fusion(%x), kind=kCustom, calls=%started
  %fusion.2 = (f32[8,8], f32[4], f32[32], u32[]) fusion(%e, %f), calls=%async_collective_fusion.2
  ROOT %async-collective-done.1 = f32[32] fusion(%h), kind=kCustom, calls=%ended
}
"""


def test_a_collective_that_xla_spreads_over_products_is_one():
    """On v5e, XLA lists it where it starts, beside every product, and where it ends."""
    found = collectives(CONTINUED, 16)
    assert [(c.kind, c.bytes, c.sent, c.times) for c in found] == [("all-gather", 128, 112, 1)]


@pytest.mark.parametrize(
    ("start", "step", "limit", "times"), [(0, 1, 7, 7), (2, 1, 7, 5), (0, 3, 7, 3), (7, 1, 7, 0)]
)
def test_trips_of_a_counter(start, step, limit, times):
    text = f"""
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %y = f32[4] all-to-all(%x), replica_groups={{{{0,1}}}}
  ROOT %t = (s32[], f32[4]) tuple(%next, %y)
}}
%condition (p: (s32[], f32[4])) -> pred[] {{
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant({limit})
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %t = (s32[], f32[4]) tuple(%copied, %x)
  ROOT %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
}}
"""
    assert Program.parse(text).runs["body"][0].times == times
    assert sum(c.total for c in collectives(text, 2)) == 8 * times
