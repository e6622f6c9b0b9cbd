"""The transformer: shapes, causality, options, and the two ways to train it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from flax import nnx
from ravine.optimizers.roles import RAVINE_RULES, assign_roles, mask_by_role
from ravine.stability import cross_entropy, next_token_loss, skip_step
from ravine.training.dropout import dropout_key, dropped
from ravine.training.model import ModelConfig, Transformer, rotate
from ravine.training.step import (
    init_params,
    init_state,
    make_loss,
    make_train_step,
    nnx_train_step,
)

from .run_rounding import rounding_of
from .tolerances import UNIT, furthest

SMALL = ModelConfig(vocabulary=32, context=8, width=16, layers=2, heads=2)
OPTIONS = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "grouped": {"heads": 4, "kv_heads": 2},
    "qk_norm": {"qk_norm": True},
    "caps": {"attention_soft_cap": 5.0, "final_soft_cap": 3.0},
    "bfloat16": {"dtype": "bfloat16"},
    "unrolled": {"unroll": 2},
    "speedrun": {
        "activation": "relu2",
        "biases": True,
        "embedding_norm": True,
        "rope_share": 0.5,
        "qk_norm": True,
        "qk_gains": False,
        "attention_scale": 0.12,
        "init_scale": 0.57,
        "final_soft_cap": 15.0,
        "soft_cap_form": "root",
    },
}


def build(**options) -> Transformer:
    fields = {"vocabulary": 32, "context": 8, "width": 16, "layers": 2, "heads": 2, **options}
    return Transformer(ModelConfig(**fields), rngs=nnx.Rngs(0))


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_float32_and_see_no_later_token(options, getkey):
    model = build(**options)
    tokens = np.array(jax.random.randint(getkey(), (2, 8), 0, 32))
    logits = forward(model, tokens)
    assert logits.shape == (2, 8, 32)
    assert logits.dtype == jnp.float32
    other = tokens.copy()  # a copy, because JAX may still be reading the original
    other[:, 5] = (tokens[:, 5] + 1) % 32
    later = forward(model, other)
    np.testing.assert_array_equal(logits[:, :5], later[:, :5])
    assert not np.allclose(logits[:, 5:], later[:, 5:])


def test_caps_bound_the_logits(getkey):
    model = build(final_soft_cap=0.5)
    logits = forward(model, jax.random.randint(getkey(), (2, 8), 0, 32))
    assert np.max(np.abs(logits)) <= 0.5


def test_qk_norm_makes_logits_independent_of_the_scale_of_queries(getkey):
    model = build(qk_norm=True)
    tokens = jax.random.randint(getkey(), (2, 8), 0, 32)
    kernel = model.layers.attention.query.kernel
    kernel[...] = 2.0**12 * kernel[...]  # so that eps = 1e-6 is negligible beside the mean square
    before = forward(model, tokens)
    kernel[...] = 2.0**12 * kernel[...]
    np.testing.assert_array_equal(before, forward(model, tokens))  # powers of two cause no rounding


def test_rotation_depends_on_the_distance_only(getkey):
    q, k = (jnp.tile(jax.random.normal(getkey(), (1, 1, 1, 8)), (1, 6, 1, 1)) for _ in range(2))
    rotated = jax.jit(lambda x: rotate(x, 1e4)[0, :, 0])
    q, k = np.asarray(rotated(q)), np.asarray(rotated(k))
    q, k = np.float64(q), np.float64(k)
    lengths = np.linalg.norm(q[0]) * np.linalg.norm(k[0])
    # Angles are at most 5 and 4, and their frequency is a power: four roundings each, and a few more.
    np.testing.assert_allclose(q[1] @ k[0], q[5] @ k[4], rtol=0, atol=(4 * 9 + 8) * UNIT * lengths)
    np.testing.assert_allclose(np.linalg.norm(q[5]), np.linalg.norm(q[0]), rtol=8 * UNIT)


def test_scanned_layers_equal_a_loop_over_them(getkey):
    model = build()
    tokens = jax.random.randint(getkey(), (2, 8), 0, 32)
    stream = model.embed(tokens)
    graphdef, stacked = nnx.split(model.layers)
    for index in range(2):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
        stream, _ = layer(stream)
    graphdef, params = nnx.split(model)
    bound = rounding_of(lambda params: forward(nnx.merge(graphdef, params), tokens), params)
    assert furthest(model.head(model.final_norm(stream)), forward(model, tokens)) <= bound


def test_a_tied_head_is_the_embedding(getkey):
    model = Transformer(dataclasses.replace(SMALL, tied=True), rngs=nnx.Rngs(0))
    assert not hasattr(model, "head")
    tokens = jax.random.randint(getkey(), (2, 8), 0, SMALL.vocabulary)
    hidden, logits = nnx.jit(lambda model, tokens: (model.hidden(tokens)[0], model(tokens)))(
        model, tokens
    )
    table = np.asarray(model.embed.embedding[...])
    hidden = np.asarray(hidden)
    bound = 2 * SMALL.width * UNIT * (abs(hidden) @ abs(table.T))  # two sums of products
    assert np.all(abs(logits - hidden @ table.T) <= bound)
    # Rows have unit size as inputs, and logits of a normalized state are about as large.
    assert 0.8 < np.std(table) * SMALL.width**0.5 < 1.2
    assert np.std(logits) < 2
    apart = Transformer(SMALL, rngs=nnx.Rngs(0))
    nnx.update(apart.layers, nnx.state(model.layers))
    apart.embed.embedding[...] = SMALL.width**0.5 * model.embed.embedding[...]
    # Half of the digits agree; without the factor, even the first one is wrong.
    assert furthest(nnx.jit(lambda m: m.hidden(tokens)[0])(apart), hidden) <= UNIT**0.5


@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_loss_of_a_tied_head(tied):
    batch = jax.random.randint(jax.random.key(1), (2, 9), 0, SMALL.vocabulary)
    graphdef, params = init_params(dataclasses.replace(SMALL, tied=tied), 0)
    plain, fused = (
        jax.jit(jax.value_and_grad(make_loss(graphdef, fused))) for fused in (False, True)
    )
    bound = rounding_of(lambda params: plain(params, batch), params)
    assert furthest(fused(params, batch), plain(params, batch)) <= bound


def test_four_norms_per_layer(getkey):
    model = Transformer(dataclasses.replace(SMALL, norms=4), rngs=nnx.Rngs(0))
    graphdef, stacked = nnx.split(model.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], stacked))
    x = jax.random.normal(getkey(), (2, 8, SMALL.width))

    @nnx.jit
    def by_hand(layer, x):
        mixed, _ = layer.attention(layer.attention_norm(x))
        x = x + layer.attention_out_norm(mixed)
        return x + layer.feed_forward_out_norm(layer.feed_forward(layer.feed_forward_norm(x)))

    found = nnx.jit(lambda layer, x: layer(x)[0])(layer, x)
    expected = by_hand(layer, x)
    assert furthest(found, expected) <= rounding_of(lambda x: by_hand(layer, x), x)
    roles = assign_roles(init_params(dataclasses.replace(SMALL, norms=4), 0)[1])
    assert roles["layers"]["feed_forward_out_norm"]["scale"] == "norm"


def test_recomputed_layers_give_the_same_gradients(getkey):
    config = ModelConfig(vocabulary=32, context=8, width=16, layers=2, heads=2)
    batch = jax.random.randint(getkey(), (2, 9), 0, 32)
    found = []
    for remat in (False, True):
        graphdef, params = init_params(dataclasses.replace(config, remat=remat), 0)
        gradient = jax.jit(jax.grad(make_loss(graphdef)))
        found.append(gradient(params, batch))
    bound = rounding_of(lambda params: gradient(params, batch), params)
    assert furthest(*found) <= bound


@pytest.mark.parametrize("remat", [False, True])
def test_layers_keep_products_or_only_their_input(remat):
    """Numbers per token that the scan of the forward pass leaves to that of the backward pass."""
    config = dataclasses.replace(SMALL, layers=3, feed_forward=48, remat=remat)
    graphdef, params = init_params(config, 0)
    batch = jnp.zeros((5, 9), int)
    gradient = jax.make_jaxpr(jax.grad(make_loss(graphdef)))(params, batch)
    forward = next(e for e in gradient.jaxpr.eqns if e.primitive.name == "scan")
    shapes = [x.aval.shape for x in forward.outvars]
    kept = sum(math.prod(shape[1:]) for shape in shapes if shape[:2] == (3, 5))
    # The stream twice, query to value and what they mix, gate and up, and the logits of two heads.
    products = 2 * 16 + 3 * 16 + 16 + 2 * 48 + 2 * 8
    assert kept == 5 * 8 * (16 if remat else products)


def test_the_backward_pass_draws_no_dropout(getkey):
    model, tokens = build(dropout=0.5), jnp.zeros((2, 8), int)
    graphdef, params = nnx.split(model, nnx.Param)

    def total(params):
        return jnp.sum(nnx.merge(graphdef, params).hidden(tokens, dropout_key=getkey())[0])

    equations = jax.make_jaxpr(jax.grad(total))(params).jaxpr.eqns
    forward, backward = (str(e) for e in equations if e.primitive.name == "scan")
    assert "random_bits" in forward
    assert "random_bits" not in backward


def test_parameters_are_stacked_and_every_one_has_a_role():
    _, params = init_params(SMALL, 0)
    attention = params["layers"]["attention"]
    assert attention["query"]["kernel"].shape == (2, 16, 16)
    # Two layers add up four branches, so each starts at half its size. The standard deviation of 512
    # numbers has a standard error of 1/32.
    value, output = (np.std(attention[name]["kernel"]) for name in ("value", "output"))
    assert abs(2 * output / value - 1) <= 5 * 2**0.5 / 32
    roles = assign_roles(params)
    assert roles["layers"]["attention_norm"]["scale"] == "norm"  # 2-D, but not a matrix
    assert roles["layers"]["feed_forward"]["down"]["kernel"] == "matrix"
    assert roles["embed"]["embedding"] == "embedding"
    assert roles["head"]["kernel"] == "head"
    state = nnx.state(Transformer(SMALL, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.leaves(assign_roles(state)) == jax.tree.leaves(roles)
    assert jax.tree.leaves(mask_by_role(["norm"])(params)).count(True) == 3


def test_a_missing_or_unused_rule_is_refused():
    _, params = init_params(SMALL, 0)
    with pytest.raises(
        ValueError, match=r"1 of 12 parameters match no role rule[\s\S]*\n  embed/embedding  "
    ):
        assign_roles(params, RAVINE_RULES[1:])
    with pytest.raises(ValueError, match="the role rule 'router' decides no parameter"):
        assign_roles(params, [*RAVINE_RULES, ("router", "router")])


def test_nnx_optimizer_and_the_functional_path_agree(getkey):
    tx = ravine.adamw(1e-2, b2=0.95)
    batch = jax.random.randint(getkey(), (4, 9), 0, 32)
    graphdef, params = init_params(SMALL, 0)
    step = jax.jit(make_train_step(graphdef, tx))
    model = Transformer(SMALL, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def losses(params):
        state, found = init_state(params, tx), []
        for _ in range(5):
            state, metrics = step(state, batch)
            found.append(metrics["loss"])
        return found

    expected = losses(params)
    found = [nnx_train_step(model, optimizer, batch) for _ in range(5)]
    assert furthest(found, expected) <= rounding_of(losses, params)
    assert expected[-1] < expected[0]


def test_the_trained_loss_has_the_z_loss_and_guards_get_it(getkey):
    batch = jax.random.randint(getkey(), (4, 9), 0, 32)
    graphdef, params = init_params(SMALL, 0)
    tx = skip_step(ravine.sgd(1e-2))
    losses = []
    for z_loss in (0.0, 0.1):
        step = jax.jit(make_train_step(graphdef, tx, z_loss=z_loss))
        state, metrics = step(init_state(params, tx), batch)
        losses.append(float(metrics["loss"]))
        assert float(state.opt_state.losses.values[0]) == losses[-1]
    logits = jax.jit(lambda p: nnx.merge(graphdef, p)(batch[:, :-1]))(params)
    parts = jax.jit(lambda z: cross_entropy(z, batch[:, 1:], z_loss=0.1))(logits)
    # The difference of two losses, each of which may be off by 16 units.
    most = 32 * UNIT * losses[1]
    assert losses[1] - losses[0] == pytest.approx(float(np.mean(parts.z_loss)), rel=0, abs=most)


def test_loss_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]]))
    targets = jnp.array([[0, 2]])
    expected = -(np.log(0.5) + np.log(0.75)) / 2
    # Logarithms of up to 2, with about eight roundings.
    assert float(next_token_loss(logits, targets)) == pytest.approx(expected, rel=16 * UNIT)
    weighted = next_token_loss(logits, targets, jnp.array([[1.0, 3.0]]))
    expected = -(np.log(0.5) + 3 * np.log(0.75)) / 4
    assert float(weighted) == pytest.approx(expected, rel=16 * UNIT)


def test_uncounted_positions_hold_anything():
    logits = jnp.zeros((1, 2, 3)).at[0, 1].set(jnp.nan)
    weights = jnp.array([[True, False]])
    targets, both = np.zeros((1, 2), int), jax.jit(jax.value_and_grad(next_token_loss))
    loss, grads = both(logits, targets, weights)
    assert float(loss) == pytest.approx(np.log(3), rel=4 * UNIT)
    assert bool(jnp.all(jnp.isfinite(grads)))
    np.testing.assert_array_equal(both(logits, targets, np.zeros((1, 2), np.float32))[1], 0.0)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"width": 30, "heads": 4}, "width 30 must be an even multiple of heads 4"),
        ({"kv_heads": 3}, "kv_heads 3 must divide heads 4"),
        ({"final_soft_cap": 0.0}, "final_soft_cap must be positive and finite"),
    ],
)
def test_impossible_models_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**fields)


def test_dropout_is_in_training_alone_and_its_mean_is_the_model(getkey):
    """The elements that are kept are scaled up, so the mean over keys equals the input."""
    model = build(dropout=0.5)
    tokens = jax.random.randint(getkey(), (2, 8), 0, 32)
    np.testing.assert_array_equal(model(tokens), build()(tokens))
    keys = jax.random.split(getkey(), 2)
    one, other = (model.hidden(tokens, dropout_key=key)[0] for key in keys)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(one, model.hidden(tokens, dropout_key=keys[0])[0])
    x = jnp.ones((64, 64))
    share = float(jnp.mean(dropped(x, 0.25, getkey())))
    assert abs(share - 1) < 6 * (0.25 / 0.75) ** 0.5 / 64  # six standard errors for 4096 draws


def test_a_step_drops_different_elements_at_each_update_and_in_each_micro_batch(getkey):
    batch = jax.random.randint(getkey(), (4, 9), 0, 32)
    first = dropout_key(jnp.int32(0), batch)
    others = [dropout_key(jnp.int32(1), batch), dropout_key(jnp.int32(0), batch[::-1])]
    assert all(
        not np.array_equal(jax.random.key_data(first), jax.random.key_data(k)) for k in others
    )
    graphdef, params = init_params(dataclasses.replace(SMALL, dropout=0.5), 0)
    step = jax.jit(make_train_step(graphdef, ravine.sgd(0.0), 2, attention_logits=False))
    state = init_state(params, ravine.sgd(0.0))
    state, before = step(state, batch)
    _, after = step(state, batch)  # no parameter has changed
    assert float(before["loss"]) != float(after["loss"])


def test_dropout_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        ModelConfig(dropout=1.0)
