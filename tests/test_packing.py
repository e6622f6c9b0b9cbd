"""Symmetric matrices in half the memory: the conversion is exact, and reads nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.optimizers.matrix.algebra.packing import pack, packed_shape, unpack

from .arrays import single


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_packing_and_back_is_exact(n, batch):
    a = np.random.default_rng(n).normal(size=(*batch, n, n))
    a = single(a + np.swapaxes(a, -1, -2))
    packed = jax.jit(pack)(a)
    assert packed.shape == (*batch, *packed_shape(n))
    np.testing.assert_array_equal(jax.jit(lambda p: unpack(p, n))(packed), a)


@pytest.mark.parametrize("n", [4, 5])
def test_only_the_lower_triangle_is_packed(n):
    a = single(np.random.default_rng(0).normal(size=(n, n)))
    lower = np.tril(a)
    np.testing.assert_array_equal(unpack(pack(a), n), lower + np.tril(a, -1).T)
    above = np.triu(np.full((n, n), np.nan, np.float32), 1)
    np.testing.assert_array_equal(pack(a + above), pack(a))


def test_packed_memory():
    assert math.prod(packed_shape(128)) == 128 * 129 // 2
    assert math.prod(packed_shape(127)) == 128 * 129 // 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.float32])
def test_packing_keeps_the_dtype(dtype):
    packed = pack(jnp.ones((3, 3), dtype))
    assert packed.dtype == unpack(packed, 3).dtype == dtype


def test_unpacking_another_size_is_refused():
    with pytest.raises(ValueError, match="for n = 6"):
        unpack(pack(jnp.eye(4)), 6)
