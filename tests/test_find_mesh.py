"""The mesh search, checked against meshes worked out by hand."""

import dataclasses
import math

import pytest
from ravine.training.cli import main
from ravine.training.plan.by_hand import Work
from ravine.training.plan.chips import CHIPS
from ravine.training.plan.model_time import busy, model_seconds
from ravine.training.plan.network import Network
from ravine.training.plan.search import candidates, stages_of
from ravine.training.shapes.presets import PRESETS

LLAMA = PRESETS["llama2-7b"]


def found(chips=16, sequences=64, memory=80e9, state_ratio=4.0, slices=1, stages=(1,), **options):
    chip = dataclasses.replace(CHIPS["h100"], memory=memory)
    network = Network.of(chip, range(chips))
    work = Work(LLAMA, {"data": chips}, sequences * LLAMA.context, **options)
    return candidates(work, state_ratio, lambda sizes: network, slices, stages=stages)


def test_every_mesh_divides_the_model_and_the_batch():
    for candidate in found():
        sizes = candidate.work.sizes
        assert math.prod(sizes.values()) == 16
        assert LLAMA.heads % sizes["tensor"] == 0
        assert LLAMA.width % (sizes["fsdp"] * sizes["tensor"]) == 0
        assert 64 % (sizes["data"] * sizes["fsdp"] * candidate.work.micro_batches) == 0
    # Four axes with sizes that are powers of two; the exponents add up to four.
    assert len(found()) == 35


def test_those_that_fit_come_first_and_then_the_fastest():
    candidates = found()
    assert [c.order for c in candidates] == sorted(c.order for c in candidates)
    assert all(c.memory <= 80e9 for c in candidates if c.fits)
    assert candidates[0].fits
    # Sixteen copies do not fit: 13.5 GB each, as much again for gradients and four times that for state.
    (copies,) = (c for c in candidates if c.work.sizes["data"] == 16)
    assert not copies.fits
    assert copies.memory > 6 * 2 * LLAMA.count


def test_micro_batches_are_the_fewest_with_which_it_fits():
    (tight,) = (c for c in found(memory=16e9) if c.mesh == "fsdp=16")
    (wide,) = (c for c in found() if c.mesh == "fsdp=16")
    # 5.1 GB are resident. Four sequences per shard take 12.8 GB more; two take half of that, plus 1.7 GB
    # for gradient sums.
    assert (wide.work.micro_batches, tight.work.micro_batches) == (1, 2)


def test_few_long_sequences_are_cut():
    # With two sequences, sixteen chips all have work only where the context or tensor axis shards them.
    cut = [c.work.size("context", "tensor") for c in found(sequences=2)]
    assert min(cut) == 8
    assert "data=2,context=8" in {c.mesh for c in found(sequences=2)}


def test_slices_divide_the_copies():
    assert all(c.work.sizes["data"] % 4 == 0 for c in found(slices=4))


PIPED = stages_of(LLAMA, 16)


def test_stages_divide_the_layers():
    assert PIPED == [1, 2, 4, 8, 16]
    meshes = found(stages=PIPED)
    # Five axes with sizes that are powers of two; the exponents add up to four.
    assert len(meshes) == 70
    assert all(math.prod(c.work.sizes.values()) == 16 for c in meshes)
    assert {c.work.size("stage") for c in meshes} == set(PIPED)
    # An encoder's micro-batches would pass twice; dense first layers would make one stage longer.
    assert stages_of(PRESETS["t5-11b"], 16) == stages_of(PRESETS["deepseek-v3"], 16) == [1]
    assert stages_of(LLAMA, 3) == [1]


def test_micro_batches_of_a_pipeline_are_those_of_the_fastest_step():
    meshes = {c.mesh: c for c in found(stages=PIPED)}
    # 32 sequences in each of two row shards: as many micro-batches, and so the smallest bubble.
    piped = meshes["stage=8,fsdp=2"]
    assert (piped.work.micro_batches, piped.waiting) == (32, 7 / 39)
    chip = CHIPS["h100"]
    model = model_seconds(piped.work, chip)
    # The last stage has the whole head, of which the mean has an eighth; the others work while it waits.
    mean = model_seconds(dataclasses.replace(piped.work, sizes={"fsdp": 16}), chip)
    head = busy(piped.work, chip) - busy(piped.work, chip, head=False)
    assert model == pytest.approx(mean + 7 / 8 * head + 7 / 32 * (mean - head / 8))
    fewer = dataclasses.replace(piped.work, micro_batches=16)
    assert model < model_seconds(fewer, chip)
    assert meshes["fsdp=16"].waiting == 0


def test_stages_are_taken_where_the_network_is_slow():
    """For 16 nodes with one GPU: FSDP sends all parameters, a stage only the residual stream."""
    chip = dataclasses.replace(CHIPS["h100"], node=1, network=CHIPS["h100"].network / 20)
    network = Network.of(chip, range(16))
    work = Work(LLAMA, {"data": 16}, 64 * LLAMA.context)
    flat, piped = (
        candidates(work, 4.0, lambda sizes: network, 1, stages=stages)[0] for stages in ([1], PIPED)
    )
    assert piped.work.size("stage") > 1
    assert piped.seconds < flat.seconds


def test_slices_cut_stages_or_copies():
    meshes = [c.mesh for c in found(slices=2, stages=PIPED)]
    assert len(meshes) == len(set(meshes))
    assert {"stage=2,data=2,fsdp=4", "data=2,stage=2,fsdp=4"} <= set(meshes)
    assert "stage=2,fsdp=8" in meshes
    assert "fsdp=16" not in meshes


def test_no_mesh_that_divides_is_an_error():
    with pytest.raises(
        ValueError, match="no mesh of 16 chips divides the model and its 7 sequences"
    ):
        found(sequences=7, slices=16)


WORDS = ["plan", "--find-mesh", "--model", "ravine", "--topology", "h100:8", "--optimizer", "adamw"]


def test_the_best_is_planned(capsys):
    assert main(WORDS) == 0
    printed = capsys.readouterr().out
    printed = " ".join(printed.split())
    assert "33 meshes of 8 chips, of 1, 2 and 4 pipeline stages, divide ravine" in printed
    assert "a step of 512 tokens; by hand, 33 of them fit" in printed
    assert "h100:8 (" in printed
    assert main([*WORDS, "--train-step"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "19 meshes of 8 chips, without pipeline stages, which are tried only without --train-step,"
        in printed
    )


def test_a_batch_that_is_not_a_whole_number_of_sequences(capsys):
    assert main([*WORDS, "--batch", "1000"]) == 2
    assert "no multiple of sequences of 64; give 1024" in capsys.readouterr().err
