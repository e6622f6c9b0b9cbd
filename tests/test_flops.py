"""Operation counts of a traced program: by hand, by the compiler, and for optimizers."""

import jax
import jax.numpy as jnp
import pytest
import ravine
from jax.sharding import PartitionSpec as P
from ravine.training.plan.flops import arithmetic


def counted(function, *arguments, devices=1):
    found = arithmetic(jax.jit(function).trace(*arguments), devices)
    assert not found.uncounted
    return found.always, found.sometimes


def test_arithmetic_of_loops_branches_and_shards():
    x, product = jnp.ones((4, 4)), lambda x: x @ x  # 128 operations
    assert counted(product, x) == (128, 0)
    assert counted(product, x, devices=4) == (32, 0)
    assert counted(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), x) == (640, 0)
    once = lambda due, x: jax.lax.while_loop(
        lambda s: s[0], lambda s: (~s[0], s[1] @ s[1]), (due, x)
    )
    assert counted(once, jnp.array(False), x) == (0, 128)
    nested = lambda due, x: jax.lax.scan(lambda c, _: (once(due, product(c))[1], None), x, None, 3)
    assert counted(nested, jnp.array(False), x) == (384, 384)
    # Always the cheaper branch; sometimes the more expensive one.
    either = lambda due, x: jax.lax.cond(due, product, jnp.negative, x)
    assert counted(either, True, x) == (16, 112)
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    halves = jax.shard_map(product, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    assert counted(halves, x, devices=8) == (128, 0)
    vectors = lambda x: jax.lax.linalg.eigh(x, symmetrize_input=False)[0]
    assert counted(vectors, x) == (9 * 4**3, 0)
    assert counted(lambda x: jnp.swapaxes(x, 0, 1).reshape(16)[::2] + 1, x) == (8, 0)
    assert counted(lambda x: jnp.sum(x, axis=0), x) == (16, 0)
    assert counted(lambda x: x + 1, jnp.int32(1)) == (0, 0)


def image_products(x):
    kernel = jnp.ones((3, 3, 4, 8))
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("function", "shapes", "operations"),
    [
        (lambda x, y: x @ y, [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(7, 3, 4), (7, 4, 5)], 7 * 2 * 3 * 4 * 5),
        (image_products, [(2, 6, 6, 4)], 2 * (2 * 4 * 4 * 8) * (3 * 3 * 4)),
        (
            lambda x, y: jax.lax.ragged_dot(x, y, jnp.array([2, 4])),
            [(6, 3), (2, 3, 5)],
            2 * 6 * 3 * 5,
        ),
        # n² for each column of the right-hand side.
        (
            lambda a, b: jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
            [(4, 4), (4, 3)],
            4 * 4 * 3,
        ),
        (lambda x: jax.lax.linalg.cholesky(x, symmetrize_input=False), [(6, 6)], 6**3 / 3),
        (lambda x: jax.lax.linalg.svd(x, full_matrices=False), [(6, 3)], 4 * 108 + 8 * 54 + 9 * 27),
        (lambda x: jax.lax.linalg.svd(x, compute_uv=False), [(6, 3)], 4 * 54 - 4 / 3 * 27),
        (lambda x: jnp.sum(jnp.exp(x), axis=1), [(5, 8)], 2 * 40),
        (
            lambda x, w: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0],
            [(3, 4), (6, 4, 4)],
            6 * (2 * 3 * 4 * 4 + 12),
        ),
    ],
    ids="product batch convolution ragged solve cholesky svd values sum scan".split(),  # noqa: SIM905
)
def test_arithmetic_of_known_programs_is_exact(function, shapes, operations):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found, rest = counted(function, *arguments)
    assert (round(found, 6), rest) == (round(operations, 6), 0)


def layer(x, w, v):
    return jax.nn.softmax(jnp.tanh(x @ w) @ v)


def backward(x, w, v):
    return jax.grad(lambda w, v: jnp.sum(layer(x, w, v) ** 2), argnums=(0, 1))(w, v)


def polynomial(x, w, v):
    for _ in range(3):
        gram = x @ x.T
        x = 3.0 * x - 2.0 * (gram @ gram) @ x
    return x @ w @ v


def attention(x, w, v):
    scores = jnp.einsum("bhd,bkd->bhk", *2 * (x.reshape(4, 16, 128),)) * 0.1
    return (
        jnp.einsum("bhk,bkd->bhd", jax.nn.softmax(scores), x.reshape(4, 16, 128)).reshape(64, 128)
        @ w
        @ v
    )


LAST = 2 * 64 * 256 * (128 + 32)  # x @ w @ v
HYPERBOLIC, SOFTMAX = 64 * 256, 64 * (5 * 32 + 1)


@pytest.mark.parametrize(
    ("function", "products", "others"),
    [
        (layer, LAST, HYPERBOLIC + SOFTMAX),
        # A gradient costs at most five times its function (Griewank and Walther, 2008, chapter 4).
        (
            backward,
            LAST + 2 * 64 * 256 * (32 + 32 + 128),
            5 * (HYPERBOLIC + SOFTMAX + 2 * 64 * 32),
        ),
        (
            polynomial,
            3 * (2 * 2 * 64 * 64 * 128 + 2 * 64**3) + LAST,
            3 * (2 * 64 * 128 + 64 * 64),
        ),
        (attention, 4 * 2 * 2 * 16 * 16 * 128 + LAST, 4 * 16 * (6 * 16 + 1)),
    ],
)
def test_arithmetic_agrees_with_the_compiler_where_that_counts(function, products, others):
    """All products agree; XLA drops some other operations and calls some transcendental."""
    arguments = [jnp.ones(shape) for shape in ((64, 128), (128, 256), (256, 32))]
    compiled = jax.jit(function).lower(*arguments).compile()
    found = counted(function, *arguments)[0]
    assert products < found <= products + others
    assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=0, abs=others)


def test_what_is_not_counted_is_listed():
    found = arithmetic(jax.jit(jnp.fft.fft).trace(jnp.ones(8, jnp.complex64)), 1)
    assert found.uncounted == {"fft"}


def test_arithmetic_of_optimizers():
    params = {"dense": {"kernel": jnp.ones((64, 128))}}

    def of(tx):
        return counted(tx.update, params, tx.init(params), params)

    # Blocks of 32: each of the eight has two Gram matrices and two products.
    tx = ravine.shampoo(0.1, blocks=ravine.Blocks(size=32))
    products = arithmetic(jax.jit(tx.update).trace(params, tx.init(params), params), 1).products
    assert sum(p.operations * times for p, times in products.items()) == 4 * 8 * 2 * 32**3
    assert of(tx)[1] >= 2 * 8 * 9 * 32**3
    assert of(ravine.adamw(0.1))[1] == 0


def test_curvature_of_sophia_is_not_in_every_step():
    params = {"kernel": jnp.ones((64, 64))}
    tx = ravine.sophia_g(0.1, every=10)
    curvature = lambda params, key: {"kernel": params["kernel"] @ params["kernel"]}
    update = lambda grads, state: tx.update(grads, state, params, curvature=curvature)
    always, sometimes = counted(update, params, tx.init(params))
    assert always < 40 * 64**2
    assert sometimes >= 2 * 64**3
