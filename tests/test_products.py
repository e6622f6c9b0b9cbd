"""Products whose gradient is written for CPUs: the same numbers, in a training step only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from flax import nnx
from jax import lax
from ravine.training.config import RunConfig
from ravine.training.model import ModelConfig, Transformer
from ravine.training.products import fast_products, product
from ravine.training.step import init_params, init_state, make_loss, make_train_step

PLAIN = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(8, 6), (6, 8)])
def test_same_value_and_gradients(inner, outer, dtype):
    rng = np.random.default_rng(0)
    x, kernel, out = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((3, 5, inner), (inner, outer), (3, 5, outer))
    )

    def with_gradients(multiply):
        return jax.vjp(lambda x, kernel: multiply(x, kernel, PLAIN), x, kernel)

    found, theirs = with_gradients(product), with_gradients(lax.dot_general)
    np.testing.assert_array_equal(found[0], theirs[0])
    for mine, other in zip(found[1](out), theirs[1](out), strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        wide = [np.asarray(each, np.float32) for each in (mine, other)]
        unit = float(jnp.finfo(dtype).eps)
        # Elements are sums of fifteen products at most, of numbers around one.
        np.testing.assert_allclose(*wide, rtol=2 * unit, atol=16 * unit)


def test_other_products_are_left_to_jax():
    x, kernel = jnp.ones((2, 8)), jnp.ones((6, 8))
    assert product(x, kernel, (((1,), (1,)), ((), ()))).shape == (2, 6)
    kept = product(
        x.astype(jnp.bfloat16),
        kernel.T.astype(jnp.bfloat16),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    assert kept.dtype == jnp.float32


def test_only_on_one_cpu_device(monkeypatch):
    model = Transformer(ModelConfig(width=16, layers=1), rngs=nnx.Rngs(0))
    layer = lambda: model.layers.feed_forward.down
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        fast_products(model)
    assert layer().dot_general is lax.dot_general
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        fast_products(model)
    assert layer().dot_general is lax.dot_general
    fast_products(model)
    assert layer().dot_general is product


@pytest.mark.parametrize("options", [{}, {"layers": 3, "biases": True}, {"remat": True}])
def test_train_step_has_the_gradients_of_the_loss(options):
    config = dataclasses.replace(RunConfig().model, **options)
    graphdef, params = init_params(config, 0)
    tx = ravine.sgd(1.0)
    batch = jax.random.randint(jax.random.key(1), (4, config.context + 1), 0, config.vocabulary)
    step = jax.jit(make_train_step(graphdef, tx, attention_logits=False))
    after, said = step(init_state(params, tx), batch)
    loss, grads = jax.jit(jax.value_and_grad(make_loss(graphdef)))(params, batch)
    assert float(said["loss"]) == pytest.approx(float(loss), rel=1e-6)
    moved = jax.tree.map(lambda old, new: old - new, params, after.params)
    for mine, other in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-6)


def test_products_are_kept_for_the_backward_pass():
    """Rematerialisation keeps results of products; through `product` it has to know them still."""
    config = dataclasses.replace(RunConfig().model, layers=3)
    graphdef, params = init_params(config, 0)
    tx = ravine.sgd(1.0)
    batch = jnp.zeros((4, config.context + 1), int)
    state = init_state(params, tx)
    step = make_train_step(graphdef, tx, attention_logits=False)
    grad = jax.grad(make_loss(graphdef))
    products = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general[")
    assert products(step, state, batch) == products(grad, params, batch)
