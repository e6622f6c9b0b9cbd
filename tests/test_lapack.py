"""Decompositions on CPU: one call for each matrix, side by side, with the same results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ravine.optimizers.matrix.algebra import lapack
from ravine.optimizers.matrix.algebra.eigenbasis import followed


def statistics(count, size):
    """Gram matrices of gradients whose columns fall off like a power, as float32."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(count, size, 2 * size)) * np.arange(1, 2 * size + 1) ** -0.8
    return jnp.asarray(columns @ columns.swapaxes(1, 2), jnp.float32)


def followed_once(batch):
    return followed(batch, jnp.broadcast_to(jnp.eye(batch.shape[-1])[None], batch.shape), sort=True)


@pytest.mark.parametrize("function", [lapack.eigh, followed_once])
@pytest.mark.parametrize("count", [1, 13])
def test_matrices_side_by_side_have_the_results_of_one_at_a_time(function, count, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    batch = statistics(count, 128)
    assert (f"unroll={lapack.SIDE_BY_SIDE}" in str(jax.make_jaxpr(function)(batch))) == (count > 1)
    found = jax.jit(function)(batch)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert "unroll=1 " in str(jax.make_jaxpr(lambda x: function(x))(batch)).replace("\n", " ")
    for ours, alone in zip(found, jax.jit(lambda x: function(x))(batch), strict=True):
        np.testing.assert_array_equal(ours, alone)


@pytest.mark.parametrize("function", [lapack.eigh, followed_once])
def test_mapped_matrices_go_one_by_one_too(function):
    """Such as those of several seeds; batches of them waited for each other forever."""
    batch = statistics(6, 16).reshape(2, 3, 16, 16)
    mapped = jax.jit(jax.vmap(function)).lower(batch).compile()
    calls = [line for line in mapped.as_text().splitlines() if "lapack_" in line]
    sizes = {size for line in calls for size in re.findall(r"f32\[([\d,]+),16,16\]", line)}
    assert calls
    assert sizes <= {"1", "1,1"}
    one = jax.jit(function)
    for index, found in enumerate(zip(*mapped(batch), strict=True)):
        for ours, alone in zip(found, one(batch[index]), strict=True):
            np.testing.assert_array_equal(ours, alone)


@pytest.mark.parametrize(("size", "constraints"), [(512, 0), (1024, 2)])
def test_very_large_matrices_are_transposed_apart(size, constraints):
    """Before LAPACK and after it, instead of within the kernels beside it."""
    qr = lambda x: jnp.linalg.qr(x)[0]
    batch = jax.ShapeDtypeStruct((2, size, size), jnp.float32)
    program = jax.make_jaxpr(lambda x: lapack.for_each_matrix(qr, x))(batch)
    assert str(program).count("layout_constraint[") == constraints


def test_eight_devices_on_few_cores_do_not_wait_for_each_other(monkeypatch):
    """Batches of more than one matrix would: a pool has a thread for each core."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    mesh, rows = jax.make_mesh((8,), ("data",)), PartitionSpec("data")
    batch = jax.device_put(statistics(8 * 13, 128), NamedSharding(mesh, rows))
    on_mesh = jax.shard_map(
        lambda x: (*lapack.eigh(x), *followed_once(x)), mesh=mesh, in_specs=rows, out_specs=rows
    )
    values, *_ = jax.jit(on_mesh)(batch)
    # LAPACK is backward stable: n times the rounding of the largest eigenvalue, times a small constant.
    bound = 128 * 2.0**-23 * float(jnp.max(values))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(np.float64(batch)), rtol=0, atol=bound)
