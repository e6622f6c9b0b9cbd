"""Meshes tried by hand."""

import dataclasses
import math

import pytest
from ravine.training.cli import main
from ravine.training.plan.by_hand import Work
from ravine.training.plan.chips import CHIPS
from ravine.training.plan.network import Network
from ravine.training.plan.search import candidates
from ravine.training.shapes.presets import PRESETS

LLAMA = PRESETS["llama2-7b"]


def found(chips=16, sequences=64, memory=80e9, state_ratio=4.0, slices=1, **options):
    chip = dataclasses.replace(CHIPS["h100"], memory=memory)
    network = Network.of(chip, range(chips))
    work = Work(LLAMA, {"data": chips}, sequences * LLAMA.context, **options)
    return candidates(work, state_ratio, lambda sizes: network, slices)


def test_every_mesh_divides():
    for candidate in found():
        sizes = candidate.work.sizes
        assert math.prod(sizes.values()) == 16
        assert LLAMA.heads % sizes["tensor"] == 0
        assert LLAMA.width % (sizes["fsdp"] * sizes["tensor"]) == 0
        assert 64 % (sizes["data"] * sizes["fsdp"] * candidate.work.micro_batches) == 0
    # Powers of two of four axes, whose exponents add up to four.
    assert len(found()) == 35


def test_those_that_fit_come_first_and_then_the_fastest():
    candidates = found()
    assert [c.order for c in candidates] == sorted(c.order for c in candidates)
    assert all(c.memory <= 80e9 for c in candidates if c.fits)
    assert candidates[0].fits
    # Sixteen copies of 13.5 GB, as much in gradients and four times that in state do not fit.
    (copies,) = (c for c in candidates if c.work.sizes["data"] == 16)
    assert not copies.fits
    assert copies.memory > 6 * 2 * LLAMA.count


def test_micro_batches_are_the_fewest_with_which_it_fits():
    (tight,) = (c for c in found(memory=16e9) if c.mesh == "fsdp=16")
    (wide,) = (c for c in found() if c.mesh == "fsdp=16")
    # 5.1 GB are held; four sequences of each shard take 12.8 GB more, two of them half of it, and 1.7 GB
    # for sums of gradients.
    assert (wide.work.micro_batches, tight.work.micro_batches) == (1, 2)


def test_few_long_sequences_are_cut():
    # Of two sequences sixteen chips have work only where the axes context or tensor cut them.
    cut = [c.work.size("context", "tensor") for c in found(sequences=2)]
    assert min(cut) == 8
    assert "data=2,context=8" in {c.mesh for c in found(sequences=2)}


def test_slices_divide_the_copies():
    assert all(c.work.sizes["data"] % 4 == 0 for c in found(slices=4))


def test_no_mesh_divides():
    with pytest.raises(
        ValueError, match="no mesh of 16 chips divides the model and its 7 sequences"
    ):
        found(sequences=7, slices=16)


WORDS = ["plan", "--find-mesh", "--model", "ravine", "--topology", "h100:8", "--optimizer", "adamw"]


def test_the_best_is_planned(capsys):
    assert main(WORDS) == 0
    printed = capsys.readouterr().out
    assert "19 meshes of 8 chips divide ravine and a step of 512 tokens; by hand, 19" in printed
    assert "h100:8 (" in printed


def test_a_batch_that_is_no_number_of_sequences(capsys):
    assert main([*WORDS, "--batch", "1000"]) == 2
    assert "no multiple of sequences of 64; give 1024" in capsys.readouterr().err
