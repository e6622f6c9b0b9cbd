"""QK-norm, safe softmax, largest logits and QK-clip, with MHA, GQA, MQA and MLA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.stability import (
    HeadWeights,
    attention,
    attention_logits,
    max_logits,
    qk_clip,
    qk_norm,
    safe_softmax,
)

from .test_losses import assert_gradient
from .tolerances import HALF, UNIT, furthest

B, T, H, K, R, D = 2, 5, 4, 6, 3, 7


def normal(rng, *shape):
    """Normal arrays in float32, or in float64 under `jax.enable_x64`."""
    return jnp.array(rng.normal(size=shape))


def plain_attention(q, k, v, cap=None):
    """Causal attention, head by head in float64 NumPy; also returns the largest logit of each head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, highest = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[2], -np.inf)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            logits = q[b, :, h] @ k[b, :, g].T / np.sqrt(q.shape[3])
            seen = np.tril(np.ones_like(logits, bool))
            highest[h] = max(highest[h], logits[seen].max())
            logits = logits if cap is None else cap * np.tanh(logits / cap)
            shares = np.where(seen, np.exp(logits), 0)
            out[b, :, h] = shares / shares.sum(axis=1, keepdims=True) @ v[b, :, g]
    return out, highest


@pytest.mark.parametrize(("groups", "cap"), [(4, None), (2, 2.0), (1, None)])
def test_attention_by_hand(groups, cap):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = (B, T, H, K), (B, T, groups, K), (B, T, groups, 3)
        qkv = [normal(rng, *shape) for shape in shapes]
        found = jax.jit(lambda *qkv: attention(*qkv, causal=True, cap=cap))(*qkv)
    mixed, highest = plain_attention(*qkv, cap)
    assert furthest(found.mixed, mixed) <= HALF
    np.testing.assert_allclose(found.max_logits, highest, rtol=2 * UNIT)  # float32


def test_mla_is_mha_with_the_shared_key_repeated():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (normal(rng, B, T, H, K) for _ in range(3))
        q_rotary, k_rotary = normal(rng, B, T, H, R), normal(rng, B, T, R)
        repeated = jnp.broadcast_to(k_rotary[:, :, None], (B, T, H, R))
        found = attention(q, k, v, q_rotary, k_rotary, causal=True)
        whole = (jnp.concatenate([q, q_rotary], -1), jnp.concatenate([k, repeated], -1))
        expected = attention(*whole, v, causal=True)
    assert furthest(found.mixed, expected.mixed) <= HALF
    np.testing.assert_allclose(found.max_logits, expected.max_logits, rtol=2 * UNIT)  # float32


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(1, 3, 2, 4))) for _ in range(3))

        def devices(q, k, v):
            q, k = qk_norm(q, k, jnp.arange(1.0, 5.0), full_width=True)
            return jnp.sum(attention(q, k, v, causal=True, cap=1.5).mixed ** 2)

        assert_gradient(devices, q, k, v)
        where = jnp.asarray(rng.random((2, 5)) > 0.4)
        assert_gradient(
            lambda z: jnp.sum(safe_softmax(z, where) ** 2), jnp.asarray(rng.normal(size=(2, 5)))
        )


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_finite_under_extreme_logits_and_masks(dtype):
    q = jnp.full((1, 2, 1, 4), 100.0, dtype)
    where = jnp.array([[[[True, True], [False, False]]]])

    def loss(q):
        found = attention(q, q, q, where=where)
        return jnp.sum(found.mixed.astype(jnp.float32)), found

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(q)
    np.testing.assert_array_equal(found.max_logits, 2e4)  # exact: whole numbers and powers of two
    np.testing.assert_array_equal(found.mixed[0, 1], 0)  # this query sees no keys
    assert bool(jnp.all(jnp.isfinite(found.mixed)))
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_uncounted_logits_hold_anything():
    logits = jnp.array([[1.0, jnp.nan, jnp.inf], [jnp.nan, jnp.nan, jnp.nan]])
    where = jnp.array([[True, False, False], [False, False, False]])
    total = lambda z: jnp.sum(safe_softmax(z, where))
    shares, grads = jax.jit(jax.value_and_grad(total))(logits)
    assert float(shares) == 1
    np.testing.assert_array_equal(grads, 0)
    highest = max_logits(logits[None, None], where[None, None])
    np.testing.assert_array_equal(highest, [1.0])


@pytest.mark.parametrize("full_width", [False, True])
def test_qk_norm_bounds_the_logits_whatever_the_weights(full_width):
    rng = np.random.default_rng(0)
    q, k = normal(rng, B, T, H, K), normal(rng, B, T, 2, K)
    small = qk_norm(q, k, full_width=full_width)
    large = qk_norm(1e3 * q, 1e3 * k, full_width=full_width)
    mean_square = lambda x: np.mean(np.float64(x) ** 2, axis=(-2, -1) if full_width else -1)
    # A mean of at most 24 squares, its root and two products: 16 units. In addition, eps = 1e-6 removes
    # this share of the smallest mean square.
    rounding, lost = 16 * UNIT, 1e-6 / mean_square(q).min()
    np.testing.assert_allclose(small[0], large[0], rtol=lost / 2 + 2 * rounding)
    bound = K**0.5 * (1 if not full_width else (H * 2) ** 0.5)
    assert float(jnp.max(max_logits(attention_logits(*large)))) <= bound * (1 + 3 * rounding)
    np.testing.assert_allclose(mean_square(small[0]), 1, rtol=lost + 2 * rounding)
    gained, _ = qk_norm(q, k, 2 * jnp.ones((H, K)), full_width=full_width)
    np.testing.assert_array_equal(gained, 2 * small[0])


LOGITS = np.array([400.0, 50.0, 200.0, 1600.0])
GAMMA = np.array([0.25, 1.0, 0.5, 0.0625])


def clip_weights(params, weights, logits=LOGITS, threshold=100.0):
    tx = optax.chain(ravine.sgd(0.0), qk_clip(threshold, weights))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params, max_logits=jnp.array(logits))
    return optax.apply_updates(params, updates)


@pytest.fixture
def _in_float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_qk_clip_multiplies_the_logits_of_each_head_by_its_own_factor(groups):
    rng = np.random.default_rng(0)
    params = {"query": normal(rng, D, H * K), "key": normal(rng, D, groups * K)}
    x = normal(rng, B, T, D)
    heads = lambda weights, n: jnp.einsum("btd,dk->btk", x, weights).reshape(B, T, n, K)
    logits = lambda p: attention_logits(heads(p["query"], H), heads(p["key"], groups))
    weights = {"query": HeadWeights("query", H), "key": HeadWeights("key", groups)}
    after = clip_weights(params, weights)
    expected = logits(params) * jnp.array(GAMMA)[None, :, None, None]
    assert furthest(logits(after), expected) <= HALF
    for name in params:  # no weight grows
        assert bool(jnp.all(jnp.abs(after[name]) <= jnp.abs(params[name])))
    if groups == 4:  # this is the rule of Kimi K2
        factor = np.repeat(np.sqrt(GAMMA), K)[None]
        for name in params:
            np.testing.assert_allclose(after[name], params[name] * factor, rtol=HALF)
    if groups == 2:  # head 1 is within bounds, so the key it shares with head 0 does not change
        np.testing.assert_array_equal(after["key"][:, :K], params["key"][:, :K])
        factor = np.repeat([1, np.sqrt(0.5)], K)[None]
        np.testing.assert_allclose(after["key"], params["key"] * factor, rtol=HALF)


@pytest.mark.usefixtures("_in_float64")
def test_qk_clip_of_mla_leaves_the_shared_key_and_the_values():
    rng = np.random.default_rng(0)
    params = {
        "q_up": normal(rng, D, H * (K + R)),
        "kv_up": normal(rng, D, H * (K + 2)),
        "k_rotary": normal(rng, D, R),
    }
    weights = {
        "q_up": HeadWeights("query", H, (("own", K), ("shared", R))),
        "kv_up": HeadWeights("key", H, (("own", K), ("fixed", 2))),
    }
    x = normal(rng, B, T, D)

    def logits(p):
        q = (x @ p["q_up"]).reshape(B, T, H, K + R)
        kv = (x @ p["kv_up"]).reshape(B, T, H, K + 2)
        return attention_logits(q[..., :K], kv[..., :K], q[..., K:], x @ p["k_rotary"])

    after = clip_weights(params, weights)
    expected = logits(params) * jnp.array(GAMMA)[None, :, None, None]
    assert furthest(logits(after), expected) <= HALF
    np.testing.assert_array_equal(after["k_rotary"], params["k_rotary"])
    values = lambda p: p["kv_up"].reshape(D, H, K + 2)[..., K:]
    np.testing.assert_array_equal(values(after), values(params))
    rotary = lambda p: p["q_up"].reshape(D, H, K + R)[..., K:]
    np.testing.assert_allclose(rotary(after), rotary(params) * GAMMA[None, :, None], rtol=HALF)


@pytest.mark.usefixtures("_in_float64")
def test_qk_clip_of_stacked_layers_and_of_layers_by_name():
    rng = np.random.default_rng(0)
    stacked = {"layers": {"query": normal(rng, 3, D, H, K), "key": normal(rng, 3, D, H, K)}}
    logits = np.stack([LOGITS, np.full(H, -5.0), LOGITS[::-1]])
    weights = {
        "query$": HeadWeights("query", H, axis=-2),
        "key$": HeadWeights("key", H, axis=-2),
    }
    after = clip_weights(stacked, weights, logits)
    factor = np.sqrt(100 / np.maximum(logits, 100))[:, None, :, None]
    np.testing.assert_allclose(
        after["layers"]["query"], stacked["layers"]["query"] * factor, rtol=HALF
    )

    apart = {str(i): jax.tree.map(lambda x, i=i: x[i], stacked["layers"]) for i in range(3)}
    tx = qk_clip(100.0, {r"(\d)/query": weights["query$"], r"(\d)/key": weights["key$"]})
    zeros = jax.tree.map(jnp.zeros_like, apart)
    by_name = {str(i): jnp.array(logits[i]) for i in range(3)}
    updates, _ = tx.update(zeros, tx.init(apart), apart, max_logits=by_name)
    for i in range(3):
        found = apart[str(i)]["key"] + updates[str(i)]["key"]
        np.testing.assert_allclose(found, after["layers"]["key"][i], rtol=HALF)


def test_qk_clip_acts_on_what_the_update_would_have_made():
    params, grads = {"q": jnp.ones((1, 2)), "k": jnp.ones((1, 2))}, jnp.full((1, 2), 2.0)
    weights = {"q": HeadWeights("query", 1), "k": HeadWeights("key", 1)}
    tx = optax.chain(ravine.sgd(0.25), qk_clip(1.0, weights))
    grads = {"q": grads, "k": grads}
    updates, _ = tx.update(grads, tx.init(params), params, max_logits=jnp.array([4.0]))
    np.testing.assert_array_equal(params["q"] + updates["q"], 0.5 * (1 - 0.25 * 2))  # powers of two


@pytest.mark.parametrize("logit", [-3.0, -1e-6, 0.0, np.inf, -np.inf, np.nan])
def test_qk_clip_leaves_heads_within_bounds_and_unknown_ones_alone(logit):
    params = {"q": jnp.ones((1, 2)), "k": jnp.ones((1, 2))}
    weights = {"q": HeadWeights("query", 1), "k": HeadWeights("key", 1)}
    after = clip_weights(params, weights, [logit], threshold=1.0)
    jax.tree.map(np.testing.assert_array_equal, after, params)


QUERY = HeadWeights("query", 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: qk_clip(0.0, {"q": QUERY}), "threshold must be positive"),
        (lambda: qk_clip(1.0, {"k": HeadWeights("key", 2)}), "needs weights of queries"),
        (
            lambda: qk_clip(1.0, {"q": QUERY, "k": HeadWeights("key", 3)}),
            "3, must divide that of query heads, 2",
        ),
        (lambda: qk_clip(1.0, {"x": QUERY}).init({"q": jnp.ones((1, 4))}), "no parameter's path"),
        (lambda: qk_clip(1.0, {"q": QUERY}).init({"q": jnp.ones((1, 5))}), r"q has shape \(1, 5\)"),
        (
            lambda: qk_clip(1.0, {"q": QUERY}).update(
                {"q": jnp.ones((1, 4))}, None, {"q": jnp.ones((1, 4))}, max_logits=jnp.ones(3)
            ),
            r"max_logits of q must be \[2\]",
        ),
        (
            lambda: qk_clip(1.0, {"q": HeadWeights("query", 0), "k": HeadWeights("key", 1)}),
            "the number of key heads, 1, must divide that of query heads, 0",
        ),
        (
            lambda: qk_clip(1.0, {"q": QUERY}).update({}, None, {}),
            "qk_clip needs max_logits",
        ),
        (
            lambda: attention_logits(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 2, 4))),
            "G dividing H",
        ),
        (lambda: attention(*[jnp.ones((1, 2, 3, 4))] * 3, cap=0.0), "cap must be positive"),
        (lambda: qk_norm(*[jnp.ones((1, 2, 3, 4))] * 2, jnp.ones(3)), "gain must have"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
