"""Checkpoints: complete or refused, the newest ones kept, and restorable onto any mesh."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.training.checkpoint import Checkpoints
from ravine.training.data.batches import Corpus, train_batches
from ravine.training.sharding import build_mesh
from ravine.training.step import TrainState

IDENTITY = {"optimizer": "adamw", "run": {"steps": 9, "model": {"width": 8}}}
SPECS = {"w": P("fsdp", "tensor"), "b": P(None)}


def batches():
    numbers = np.arange(1000, dtype=np.uint16)
    corpus = Corpus(numbers, numbers, 1 << 16, None, "numbers", "0" * 16)
    return train_batches(corpus, batch_size=4, context=8, seed=0)


def state(step, mesh):
    """The state after a step, recognizable by its values."""
    tree = {"w": jnp.arange(64.0).reshape(8, 8) + step, "b": jnp.full(3, float(step))}
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = {name: place(x, SPECS[name]) for name, x in tree.items()}
    return TrainState(place(jnp.int32(step), P()), params, {"mu": place(tree["w"] / 2, P("fsdp"))})


def mesh_of(text, count=8):
    return build_mesh(text, jax.devices()[:count])


MESH = "fsdp=4,tensor=2"


def write(folder, steps=(2, 4), identity=IDENTITY):
    checkpoints, data, mesh = Checkpoints(folder, identity), batches(), mesh_of(MESH)
    for step in range(1, max(steps) + 1):
        next(data)
        if step in steps:
            checkpoints.save(state(step, mesh), data)
    checkpoints.close()


def read(folder, identity=IDENTITY, text=MESH, count=8):
    """The restored state, and how often the data were read."""
    checkpoints, data = Checkpoints(folder, identity), batches()
    try:
        found = checkpoints.restore(state(0, mesh_of(text, count)), data)
        return found, data.get_state()["next_index"]
    finally:
        checkpoints.close()


def equal(found, step):
    expected = state(step, mesh_of(MESH))
    return all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [(MESH, 8), ("fsdp=2,tensor=4", 8), ("fsdp=2,tensor=2", 4), ("fsdp=1,tensor=1", 1)],
)
def test_restored_onto_any_mesh(text, count, tmp_path):
    write(tmp_path)
    found, position = read(tmp_path, text=text, count=count)
    assert equal(found, 4)
    assert position == 4
    target = state(0, mesh_of(text, count))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, target)


def test_an_empty_folder_gives_the_state_back(tmp_path):
    found, position = read(tmp_path / "none")
    assert equal(found, 0)
    assert position == 0


def test_the_last_checkpoints_are_kept(tmp_path):
    write(tmp_path, steps=(1, 2, 3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def largest(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    return max(files, key=lambda path: path.stat().st_size)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# Each damages a checkpoint's folder in the way that a full disk or an incomplete copy does.
DAMAGE = {
    "data truncated": lambda folder: halve(largest(folder)),
    "data lost": lambda folder: largest(folder).unlink(),
    "manifest empty": lambda folder: next(folder.rglob("manifest.ocdbt")).write_bytes(b""),
    "metadata truncated": lambda folder: halve(folder / "_CHECKPOINT_METADATA"),
    "tree truncated": lambda folder: halve(next(folder.rglob("_METADATA"))),
    "manifest zeroed": lambda folder: zero(next(folder.rglob("manifest.ocdbt"))),
    "metadata zeroed": lambda folder: zero(folder / "_CHECKPOINT_METADATA"),
    "data zeroed": lambda folder: zero(largest(folder)),
    "a bit flipped": lambda folder: flip(largest(folder)),
    "seal zeroed": lambda folder: zero(folder / "files.json"),
    "seal truncated": lambda folder: halve(folder / "files.json"),
    "seal not written": lambda folder: (folder / "files.json").unlink(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(damage, written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "4")
    with pytest.warns(
        UserWarning, match=rf"step 4 in {tmp_path} (was cut off|is damaged) .* of step 2"
    ):
        found, position = read(tmp_path)
    assert equal(found, 2)
    assert position == 2
    # A resumed run writes step 4 again.
    write(tmp_path, steps=(4,))
    assert equal(read(tmp_path)[0], 4)


def test_what_a_kill_leaves_behind_is_ignored(tmp_path):
    write(tmp_path)
    (tmp_path / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "6.orbax-checkpoint-tmp" / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert equal(read(tmp_path)[0], 4)
    assert not (tmp_path / "6.orbax-checkpoint-tmp").exists()


def test_a_folder_without_a_whole_checkpoint_is_refused_and_nothing_is_removed(tmp_path):
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for step in ("2", "4"):
        halve(largest(tmp_path / step))
    with pytest.raises(
        ValueError, match=r"none of the checkpoints in .* step 4 was cut off .* bytes"
    ):
        read(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**IDENTITY, "optimizer": "lion"}, "optimizer is 'adamw' there and 'lion' here"),
        (
            {"optimizer": "adamw", "run": {"steps": 9, "model": {"width": 16}}},
            "run.model.width is 8 there and 16 here",
        ),
        ({**IDENTITY, "more": 1}, "more is None there and 1 here"),
    ],
)
def test_other_hyperparameters_are_refused_by_name(other, said, tmp_path):
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"step 4 is of another configuration .*{said}"):
        read(tmp_path, identity=other)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_other_hyperparameters_is_set_aside_and_the_one_before_is_used(tmp_path):
    folder, other = tmp_path / "run", {**IDENTITY, "optimizer": "lion"}
    write(folder, steps=(2,))
    for _ in range(2):
        write(folder, steps=(6,), identity=other)
        with pytest.warns(UserWarning, match=r"6 .* 'lion' there .* set aside; .* of step 2"):
            found, position = read(folder)
        assert equal(found, 2)
        assert position == 2
        # A resumed run writes its own step 6; the other one stays complete in case it is needed.
        write(folder, steps=(6,))
        assert equal(read(folder)[0], 6)
        shutil.rmtree(folder / "6")
    assert sorted(path.name for path in (tmp_path / "run-refused").iterdir()) == ["6.0", "6.1"]
    (tmp_path / "run-refused" / "6.1").rename(tmp_path / "run-refused" / "6")
    assert equal(read(tmp_path / "run-refused", identity=other)[0], 6)


def test_the_seal_covers_every_file(tmp_path):
    write(tmp_path)
    listed = json.loads((tmp_path / "4" / "files.json").read_text())
    there = [path for path in (tmp_path / "4").rglob("*") if path.is_file()]
    assert len(there) == len(listed) + 1
    assert sum(content["bytes"] for content in listed.values()) > 64 * 4


def test_positions_continue_the_data(tmp_path):
    write(tmp_path)
    checkpoints, data = Checkpoints(tmp_path, IDENTITY), batches()
    checkpoints.restore(state(0, mesh_of(MESH)), data)
    checkpoints.close()
    expected = list(itertools.islice(batches(), 6))
    np.testing.assert_array_equal(next(data), expected[4])
    assert Path(tmp_path, "4").exists()
