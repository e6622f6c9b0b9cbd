"""Where leaves are placed on a mesh, and that they return to where they were."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.optimizers.matrix.mesh.dealing import ragged_all_to_all
from ravine.optimizers.matrix.mesh.exchange import (
    move_in,
    move_out,
    whole_matrices,
)
from ravine.optimizers.matrix.mesh.placement import Move, names_of, place, spec

from .tolerances import HALF, furthest

SIZES = {"a": 2, "b": 2, "c": 2}
# Every way to shard the two axes of a leaf over up to three mesh axes.
OUTSIDES = [
    tuple(tuple(n for n, at in zip(SIZES, where, strict=True) if at == axis) for axis in range(2))
    for where in itertools.product([0, 1, None], repeat=3)
]


def cut(names):
    return math.prod(SIZES[name] for name in names)


@pytest.mark.parametrize("sums", [(), (1,)])
@pytest.mark.parametrize("cuts", [(1, 1), (8, 8), (2, 1), (1, 4), (3, 6)])
def test_placement_keeps_blocks_whole(cuts, sums):
    for outside in OUTSIDES:
        found = place(outside, cuts, SIZES, sums)
        for axis, names in enumerate(found.inside):
            assert axis in sums or cuts[axis] % cut(names) == 0
            # The slowest-varying mesh axes stay, so a device's part remains contiguous.
            kept = len([name for name in names if name in outside[axis]])
            assert names[:kept] == outside[axis][:kept]
        inside = [name for names in found.inside for name in names]
        gathered = [move.name for move in found.moves if move.target is None]
        assert sorted(inside + gathered) == sorted(SIZES)
        assert found.repeated == cut(gathered)
        assert set(found.summed) == {name for axis in sums for name in outside[axis]}


@pytest.mark.parametrize(
    ("outside", "cuts", "moves"),
    [
        ([("a",), ("b", "c")], (8, 8), []),
        ([("a",), ("b",)], (1, 8), [Move("a", 0, 1), Move("c", None, 1)]),
        ([("a", "b"), ()], (2, 1), [Move("b", 0, None), Move("c", None, None)]),
        (
            [("a", "b"), ()],
            (1, 1),
            [Move(n, s, None) for n, s in (("b", 0), ("a", 0), ("c", None))],
        ),
        ([(), ()], (3, 4), [Move("a", None, 1), Move("b", None, 1), Move("c", None, None)]),
    ],
)
def test_moves(outside, cuts, moves):
    assert list(place(outside, cuts, SIZES).moves) == moves


@pytest.mark.parametrize("cuts", [(8, 8), (1, 1), (1, 8), (2, 2)])
@pytest.mark.parametrize("outside", [(("a",), ("b", "c")), (("c", "a"), ()), ((), ("b",))])
def test_moving_in_brings_the_right_part_and_moving_out_undoes_it(outside, cuts):
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES))
    found = place(outside, cuts, SIZES)
    x = jnp.arange(16 * 24.0).reshape(16, 24)

    @jax.jit
    def both(x):
        into = jax.shard_map(
            lambda x: move_in(x, found),
            in_specs=spec(outside),
            out_specs=spec(found.inside),
            check_vma=False,
        )(x)
        back = jax.shard_map(
            lambda x: move_out(x, found),
            in_specs=spec(found.inside),
            out_specs=spec(outside),
            check_vma=False,
        )(into)
        return into, back

    with jax.set_mesh(mesh):
        into, back = both(jax.device_put(x, NamedSharding(mesh, spec(outside))))
    for y, names in ((into, found.inside), (back, outside)):
        assert names_of(y) == names
        np.testing.assert_array_equal(y, x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("count", "work"), [(1, 1), (3, None), (8, 1), (17, 3)])
@pytest.mark.parametrize(
    ("rows", "columns"), [(("x",), ("y",)), ((), ("y", "x")), ((), ("y",)), ((), ())]
)
def test_whole_matrices_are_whole_and_return(count, work, rows, columns, ragged):
    sizes = {"x": 2, "y": 2, "z": 2}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    x = jnp.array(np.random.default_rng(0).normal(size=(count, 8, 12)))
    shapes = []

    def function(batch):
        shapes.append(batch.shape)
        return batch * jnp.sum(jnp.abs(batch), axis=(1, 2), keepdims=True)

    names = spec([(), rows, columns])
    local = lambda x: whole_matrices(function, x, rows, columns, sizes, ragged=ragged)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, names))
        found = jax.jit(jax.shard_map(local, in_specs=names, out_specs=names, check_vma=False))(
            sharded
        )
    assert names_of(found) == ((), rows, columns)
    # Devices that hold the same matrices divide them up, as long as each gets at least one.
    if work is None:
        work = 1 if len(rows + columns) == 2 else 2
    assert shapes == [(work, 8, 12)]
    assert furthest(found, function(x)) <= HALF


def test_a_ragged_exchange_without_the_collective():
    """The example from JAX's documentation, with rows of two."""
    data = lambda *values: jnp.repeat(jnp.array(values, jnp.int32)[:, None], 2, axis=1)
    # For each device: operand, output, input offsets, send sizes, output offsets, receive sizes.
    slices = (((0, 1), (1, 2), (0, 0), (1, 1)), ((0, 1), (1, 1), (1, 2), (2, 1)))
    first, second = ([jnp.array(x, jnp.int32) for x in device] for device in slices)
    both = [data(1, 2, 2, 3, 4, 0), data(0, 0, 0, 0, 0, 0, 0, 9)]
    both += [jnp.concatenate(pair) for pair in zip(first, second, strict=True)]
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    exchange = jax.shard_map(
        lambda *arguments: ragged_all_to_all(*arguments, ("x",), longest=2),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        found = exchange(*(jax.device_put(x, NamedSharding(mesh, P("x"))) for x in both))
    # Elements that nothing is written to keep their values.
    np.testing.assert_array_equal(found, data(1, 3, 0, 0, 2, 2, 4, 9))


def test_names_of_arrays_without_a_mesh():
    assert names_of(np.zeros((2, 3))) == names_of(jnp.zeros((2, 3))) == ((), ())


def test_specifications_round_trip():
    assert spec([("a",), (), ("b", "c")]) == P("a", None, ("b", "c"))
