"""Processing the blocks of several leaves together: same results, few programs, bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.optimizers.matrix.batch.together import Unit, together

COUNTS = (20, 3, 7, 1)


def units(counts=COUNTS, *, is_whole=False, growth=1):
    made = []
    for at, count in enumerate(counts):
        rng = np.random.default_rng(at)
        carry, source = (jnp.array(np.float32(rng.normal(size=(count, 2, 3)))) for _ in range(2))
        made.append(Unit("kind", [source], {"x": carry}, is_whole=is_whole, growth=growth))
    return made


def run(made, max_elements):
    """The results, and the block counts of all traced calls."""
    traced = []

    def function(kind, carry, source):
        assert kind == "kind"
        traced.append(carry["x"].shape[0])
        return {"x": 2 * carry["x"] + source[0]}

    return jax.jit(lambda: together(made, function, max_elements))(), traced


@pytest.mark.parametrize("max_elements", [None, 1, 6, 13, 30, 60, 100, 10_000])
@pytest.mark.parametrize("is_whole", [False, True])
def test_every_block_once(max_elements, is_whole):
    made = units(is_whole=is_whole)
    for unit, found in zip(made, run(made, max_elements)[0], strict=True):
        np.testing.assert_array_equal(found["x"], 2 * unit.carry["x"] + unit.source[0])


def test_few_blocks_are_one_batch():
    assert run(units(), None)[1] == [sum(COUNTS)]


def test_many_blocks_are_one_program_on_slices_of_all():
    # Ten of forty at once: five from each leaf.
    assert set(run(units((20, 20)), 60)[1]) == {10}


def test_what_cannot_be_sliced_as_finely_is_processed_alone():
    # Twenty blocks make seven slices of three; three blocks and one block are too few for that.
    assert sum(run(units((20, 3, 1)), 18)[1]) < 20 + 3 + 1
    assert max(run(units((20, 3, 1)), 18)[1]) <= 4
    assert run(units((1, 1, 1)), 6)[1] == [1, 1, 1]


def test_packed_arrays_count_as_what_they_become():
    assert set(run(units((20, 20), growth=2), 60)[1]) == {6}


def test_whole_units_are_never_cut_nor_joined():
    assert run(units(is_whole=True), 1)[1] == list(COUNTS)


def test_nothing_to_replace_and_no_blocks():
    made = [Unit("kind", [jnp.ones((2, 2, 3))], {}), *units((0,)), *units((2,))]
    found, traced = run(made, None)
    assert (found[0], found[1]["x"].shape, traced) == ({}, (0, 2, 3), [2])


def test_shapes_dtypes_and_kinds_are_kept_apart():
    carries = [jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3))]
    made = [Unit(at == 3, (), x) for at, x in enumerate(carries)]
    seen = []

    def function(kind, carry, source):
        seen.append((kind, carry.shape, carry.dtype))
        return -carry

    found = together(made, function)
    assert len(set(seen)) == len(seen) == 4
    for x, old in zip(found, carries, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), -np.asarray(old, np.float32))
