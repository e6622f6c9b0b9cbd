"""The exchanges that updates on a mesh need: which collectives, how many, and how many bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ravine.optimizers.matrix.algebra.polar import NewtonSchulz
from ravine.training.plan.collectives import collectives

from .newton_schulz import of_bfloat16, relative_norm
from .preconditioned import EXPERTS, EXPERTS_ALONE, on_matrices
from .tolerances import HALF

SHAPES = {"a": (8, 16), "b": (16, 8), "stack": (4, 8, 8), "square": (8, 8), "turned": (8, 8)}


def exchanges(tx, specs, sizes, shapes=SHAPES):
    """The collectives in the compiled update."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    with jax.set_mesh(mesh):
        params = {
            k: jax.ShapeDtypeStruct(shapes[k], jnp.float32, sharding=NamedSharding(mesh, s))
            for k, s in specs.items()
        }
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            ravine.state_shardings(tx, params),
        )
        text = jax.jit(tx.update).lower(params, state).compile().as_text()
    return collectives(text)


def communicated(*arguments):
    """Names of the collectives in the compiled update, and of those inside loops."""
    found = exchanges(*arguments)
    return [c.kind for c in found], [c.kind for c in found if c.in_loop]


ALIGNED = {"a": P("x", "y"), "b": P("y", "x"), "stack": P(None, "x", "y")}


@pytest.mark.parametrize(
    "tx",
    [
        ravine.scale_by_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        ravine.scale_by_shampoo(
            blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2, staggered=True)
        ),
        ravine.scale_by_soap(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
        ravine.scale_by_kl_shampoo(blocks=ravine.Blocks(size=4), refresh=ravine.Refresh(every=2)),
    ],
    ids=["shampoo", "staggered", "soap", "kl_shampoo"],
)
def test_aligned_blocks_need_no_communication(tx):
    assert communicated(tx, ALIGNED, {"x": 2, "y": 2}) == ([], [])


@pytest.mark.parametrize("name", ["shampoo", "soap", "kl_shampoo", "muon"])
def test_sharded_experts_need_no_communication(name):
    """This holds wherever the expert axis is among the batch axes, and if two of these are sharded."""
    found = communicated(on_matrices(name), EXPERTS_ALONE, {"x": 4, "y": 2}, EXPERTS)
    assert found == ([], [])


def test_muon_exchanges_for_experts_what_rows_and_columns_ask():
    specs = {"layers-experts": P(None, "x", "y"), "experts-layers": P("x", None, None, "y")}
    found, inside = communicated(ravine.scale_by_muon(), specs, {"x": 4, "y": 2}, EXPERTS)
    assert found == ["all-to-all"] * 4
    assert not inside


def test_blocks_that_shards_cross_are_seen_by_these_tests():
    found, inside = communicated(
        ravine.scale_by_shampoo(refresh=ravine.Refresh(every=2)), ALIGNED, {"x": 2, "y": 2}
    )
    assert found
    assert not inside


@pytest.mark.parametrize("name", ["shampoo", "kl_shampoo", "soap"])
def test_only_gradients_travel_to_blocks_and_directions_back(name):
    """Moments are kept in blocks, where these are processed."""
    tx = on_matrices(name)
    whole = exchanges(tx, {"a": P("x")}, {"x": 8}, {"a": (8, 16)})
    assert [c.kind for c in whole] == ["all-gather"]
    assert sum(c.sent for c in whole) == 8 * 16 * 4 * 7 / 8
    # Two leaves of four layers each; every device gets some of them.
    specs, shapes = dict.fromkeys("ab", P(None, "x")), dict.fromkeys("ab", (4, 8, 16))
    dealt = exchanges(tx, specs, {"x": 4}, shapes)
    assert [(c.kind, c.sent) for c in dealt] == 4 * [("all-to-all", 8 * 16 * 4 * 3 / 4)]


def test_muon_exchanges_once_in_and_once_out_for_every_shape():
    found, inside = communicated(ravine.scale_by_muon(), ALIGNED, {"x": 4, "y": 2})
    # a and the transposed b form one batch, the stack another.
    assert found == ["all-to-all"] * 4
    assert not inside


def test_matrices_of_one_shape_are_exchanged_together_however_they_are_cut():
    specs = {"a": P("x", "y"), "b": P("x", "y"), "square": P("x", "y"), "turned": P("y", "x")}
    found, _ = communicated(ravine.scale_by_muon(), specs, {"x": 4, "y": 2})
    # a and the transposed b would share a batch, but one is sharded by rows and the other by columns.
    assert found == ["all-to-all"] * 6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (3, 4, 24)], ids=str)
def test_gram_matrices_are_summed_where_columns_stay_cut(shape, method):
    """The update equals that of whole matrices, and only sums are exchanged.

    "float32" computes the products of float64 matrices in float64. In "bfloat16", a sum in another order
    may round the other way, and a single element affects all others. Each result is off by what random
    rounding does to the products, so their difference is below twice that, times the root of 2.
    """
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    names = P(*[None] * (len(shape) - 2), *(("x", "y") if shape[-1] > shape[-2] else ("y", "x")))
    dtype = np.float64 if method == "float32" else np.float32
    g = jnp.array(np.random.default_rng(0).normal(size=shape), dtype)
    updates, programs = {}, {}
    for distribution in ("whole", "ragged", "gram"):
        polar = NewtonSchulz(dtype=method, distribution=distribution)
        tx = ravine.orthogonalize(polar)
        with jax.set_mesh(mesh):
            cut = jax.device_put(g, NamedSharding(mesh, names))
            compiled = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0]).lower(cut).compile()
            updates[distribution] = np.asarray(compiled(cut))
        programs[distribution] = {c.kind for c in collectives(compiled.as_text())}
    alone = NewtonSchulz(dtype=method, form="gram" if method == "float32" else "standard")
    expected = jax.jit(ravine.orthogonalize(alone).update)(g, optax.EmptyState())[0]
    wide = g if shape[-1] > shape[-2] else g.T
    of_one = of_bfloat16(wide.reshape(-1, *wide.shape[-2:]), "standard")
    tolerance = HALF if method == "float32" else 2 * 2**0.5 * of_one
    for found in updates.values():
        assert relative_norm(found, expected) <= tolerance
    # XLA for CPU has no ragged exchange; ours is emulated with even ones.
    assert programs["whole"] == programs["ragged"] == {"all-to-all"}
    assert "all-reduce" in programs["gram"]


def test_few_long_matrices_stay_cut_unless_asked_otherwise():
    """For 8 x 4096 on eight devices, a Gram matrix is far smaller than seven more such matrices."""
    mesh = jax.make_mesh((8,), ("x",))
    g = jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    for distribution, kinds in (("auto", {"all-reduce"}), ("whole", {"all-to-all"})):
        tx = ravine.orthogonalize(NewtonSchulz(distribution=distribution))
        with jax.set_mesh(mesh):
            program = jax.jit(lambda g, tx=tx: tx.update(g, optax.EmptyState())[0]).lower(g)
        assert {c.kind for c in collectives(program.compile().as_text())} == kinds
