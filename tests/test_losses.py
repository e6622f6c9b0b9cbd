"""Losses: finite differences, extreme logits, masks, documents; the fused loss against full logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ravine.stability import (
    cross_entropy,
    document_weights,
    fused_cross_entropy,
    log_sum_exp,
    next_token_loss,
    soft_cap,
    token_mean,
)
from ravine.training.plan.collectives import collectives

from .tolerances import HALF, UNIT, furthest

EVERYTHING = {"z_loss": 1e-2, "cap": 3.0, "label_smoothing": 0.1}
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 1e-2},
    "cap": {"cap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "everything": EVERYTHING,
}
EACH = ("z_loss", "cap", "smoothing")
options = pytest.mark.parametrize(
    "options",
    [
        pytest.param(value, id=name, marks=[pytest.mark.slow] if name in EACH else [])
        for name, value in OPTIONS.items()
    ],
)


def problem(tokens, vocabulary, width=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(tokens, width)).astype(dtype)
    unembedding = rng.normal(size=(width, vocabulary)).astype(dtype)
    labels = rng.integers(0, vocabulary, tokens).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], tokens).astype(np.float32)
    return hidden, unembedding, labels, weights


def jitted(function, **options):
    return jax.jit(functools.partial(function, **options))


def naive(hidden, unembedding, labels, weights=None, **options):
    parts = cross_entropy(hidden @ unembedding, labels, **options)
    return token_mean(parts.loss + parts.z_loss, weights), parts


def with_gradient(function, **fixed):
    """The loss, its parts, and the gradients of the hidden states and the unembedding."""
    return jax.jit(jax.value_and_grad(functools.partial(function, **fixed), (0, 1), has_aux=True))


def assert_gradient(function, *arguments, step=1e-5):
    """Compares the derivative along a random direction with central differences, in float64.

    Doubling the step makes the truncation error four times as large, so the difference between the two
    steps is three times that error. The function values are rounded to at most 64 units of themselves or
    of 1.
    """
    rng = np.random.default_rng(7)
    directions = [rng.normal(size=x.shape) for x in arguments]

    @jax.jit
    def both():
        moved = lambda h: function(*(x + h * d for x, d in zip(arguments, directions, strict=True)))
        grads = jax.grad(function, tuple(range(len(arguments))))(*arguments)
        analytic = sum(jnp.vdot(g, d) for g, d in zip(grads, directions, strict=True))
        return analytic, jax.lax.map(moved, step * jnp.array([-2.0, -1.0, 1.0, 2.0]))

    analytic, values = both()
    once, twice = (values[2] - values[1]) / (2 * step), (values[3] - values[0]) / (4 * step)
    bound = abs(twice - once) + 64 * 2.0**-53 * (1 + np.max(np.abs(values))) / step
    assert abs(float(analytic)) > 1e4 * bound  # otherwise the comparison would say little
    np.testing.assert_allclose(analytic, once, rtol=0, atol=bound)


@options
def test_gradients_equal_finite_differences(options):
    with jax.enable_x64(True):
        hidden, unembedding, labels, weights = problem(7, 13, dtype=np.float64)
        weights, labels = weights.astype(np.float64), labels % 12
        where = np.arange(13)[None] != (labels[:, None] + 1) % 13

        def held(logits):
            parts = cross_entropy(logits, labels, where=where, **options)
            return token_mean(parts.loss + parts.z_loss, weights)

        def fused(hidden, unembedding):
            loss, _ = fused_cross_entropy(
                hidden, unembedding, labels, weights=weights, chunk=3, vocabulary=12, **options
            )
            return loss

        assert_gradient(held, hidden @ unembedding)
        assert_gradient(fused, hidden, unembedding)


@pytest.mark.parametrize("form", ["tanh", "root"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_cap_holds_for_the_largest_logits_of_every_dtype(form, dtype):
    """The square of the root form overflowed, and large logits became 0, infinite ones NaN."""
    largest = float(jnp.finfo(dtype).max)
    logits = jnp.array([300 * 30.0, largest / 2, largest, jnp.inf], dtype)
    found = soft_cap(jnp.concatenate([logits, -logits]), 30.0, form).astype(jnp.float32)
    eps, first = float(jnp.finfo(dtype).eps), 30 if form == "tanh" else 30 / (1 + 300**-2) ** 0.5
    expected = np.array([first, 30, 30, 30])
    np.testing.assert_allclose(found, [*expected, *-expected], rtol=4 * eps)
    assert jnp.isnan(soft_cap(jnp.array(jnp.nan, dtype), 30.0, form))
    slopes = jax.vmap(jax.grad(lambda z: soft_cap(z, 30.0, form)))(logits)
    slope = [0 if form == "tanh" else (1 + 300**2) ** -1.5, 0, 0, 0]
    # The first is the difference of two numbers of 1 / 300.
    np.testing.assert_allclose(slopes.astype(jnp.float32), slope, rtol=0, atol=4 * eps / 300)


def test_gradients_of_the_pieces_equal_finite_differences():
    with jax.enable_x64(True):
        logits = problem(7, 13, dtype=np.float64)[0]
        where = logits > -0.5
        targets = np.zeros((1, 7), int)
        assert_gradient(lambda z: jnp.sum(log_sum_exp(z, where) ** 2), logits)
        assert_gradient(lambda z: jnp.sum(soft_cap(z, 0.7) ** 2 * logits), logits)
        assert_gradient(lambda z: next_token_loss(z[None], targets), logits)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(37, 257), (9, 32768), (5, 50257)])
def test_fused_equals_naive(tokens, vocabulary):
    with jax.enable_x64(True):
        hidden, unembedding, labels, weights = problem(tokens, vocabulary, dtype=np.float64)
        weights = weights.astype(np.float64)
        for name in ("plain", "everything"):
            fixed = {"labels": labels, "weights": weights, **OPTIONS[name]}
            fused = with_gradient(fused_cross_entropy, chunk=4, **fixed)
            (loss, parts), grads = fused(hidden, unembedding)
            (expected, expected_parts), expected_grads = with_gradient(naive, **fixed)(
                hidden, unembedding
            )
            expected_parts = [np.where(weights > 0, part, 0) for part in expected_parts]
            found = [loss, *parts, *grads]
            assert furthest(found, [expected, *expected_parts, *expected_grads]) <= HALF


@pytest.mark.parametrize("vocabulary", [257, pytest.param(50257, marks=pytest.mark.slow)])
def test_fused_in_bfloat16_rounds_nothing_but_what_it_is_given_and_gradients(vocabulary):
    hidden, unembedding, labels, weights = problem(11, vocabulary)
    fused = functools.partial(fused_cross_entropy, labels=labels, weights=weights, chunk=4)
    fused = with_gradient(fused, **EVERYTHING)
    (loss, _), grads = fused(hidden.astype(jnp.bfloat16), unembedding)
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]

    def held(logits):
        parts = cross_entropy(logits, labels, **EVERYTHING)
        return token_mean(parts.loss + parts.z_loss, weights)

    h, w = (np.float32(x.astype(jnp.bfloat16)) for x in (hidden, unembedding))
    expected, of_logits = jax.jit(jax.value_and_grad(held))(h @ w)
    of_logits = np.asarray(of_logits)
    # A logit is a sum of 8 products, and its error enters a loss twice; the rest adds as much again.
    np.testing.assert_allclose(loss, expected, rtol=0, atol=32 * UNIT * np.max(abs(h) @ abs(w)))
    # Values rounded to 8 bits: the logits' gradient and the sums, which for hidden states happens twice.
    unit = 2.0**-8 + 64 * UNIT
    bound = 3 * unit * (abs(of_logits) @ abs(w.T)), 2 * unit * (abs(h.T) @ abs(of_logits))
    for found, right, most in zip(grads, (of_logits @ w.T, h.T @ of_logits), bound, strict=True):
        assert np.all(abs(np.float32(found) - right) <= most)


def test_padded_columns_count_for_nothing():
    with jax.enable_x64(True):
        hidden, unembedding, labels, _ = problem(6, 257, dtype=np.float64)
        padded = np.pad(unembedding, ((0, 0), (0, 7)), constant_values=5.0)
        fused = lambda w, **more: fused_cross_entropy(hidden, w, labels, **EVERYTHING, **more)[0]
        loss, grads = jax.jit(jax.value_and_grad(functools.partial(fused, vocabulary=257)))(padded)
        assert furthest(loss, jax.jit(fused)(unembedding)) <= HALF
        np.testing.assert_array_equal(grads[:, 257:], 0)
        where = np.arange(264)[None] < 257
        held, _ = jitted(naive, where=where, **EVERYTHING)(hidden, padded, labels)
        assert furthest(loss, held) <= HALF


def auto_mesh(axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def sharded_loss(mesh, vocabulary, labels, weights):
    def loss(hidden, unembedding, labels, weights):
        return fused_cross_entropy(
            hidden,
            unembedding,
            labels,
            weights=weights,
            chunk=8,
            vocabulary=vocabulary,
            vocabulary_axis="v",
            token_axes="t" if "t" in mesh.axis_names else (),
            **EVERYTHING,
        )[0]

    rows = P("t") if "t" in mesh.axis_names else P()
    inner = jax.shard_map(loss, mesh=mesh, in_specs=(rows, P(None, "v"), rows, rows), out_specs=P())
    return lambda hidden, unembedding: inner(hidden, unembedding, labels, weights)


@pytest.mark.parametrize(
    "axes",
    [pytest.param({"v": 8}, id="vocabulary", marks=pytest.mark.slow), {"t": 2, "v": 4}],
)
def test_sharded_vocabulary_equals_one_device(axes):
    with jax.enable_x64(True):
        hidden, unembedding, labels, weights = problem(34, 257, dtype=np.float64)
        weights = weights.astype(np.float64)
        padded = np.pad(unembedding, ((0, 0), (0, 7)))
        loss = sharded_loss(auto_mesh(axes), 257, labels, weights)
        found, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, padded)
        expected = with_gradient(naive, labels=labels, weights=weights, **EVERYTHING)
        (expected, _), expected_grads = expected(hidden, unembedding)
    inside = (grads[0], grads[1][:, :257])
    assert furthest((found, inside), (expected, expected_grads)) <= HALF
    np.testing.assert_array_equal(grads[1][:, 257:], 0)


def test_sharded_vocabulary_exchanges_scalars_of_tokens_only():
    tokens, width = 32, 64
    hidden, unembedding, labels, weights = problem(tokens, 264, width=width)
    mesh = auto_mesh({"v": 8})
    loss = sharded_loss(mesh, 257, labels, weights)
    forward = collectives(jax.jit(loss).lower(hidden, unembedding).compile().as_text())
    assert forward
    assert all(c.kind == "all-reduce" and c.bytes <= 3 * 8 * 4 for c in forward)  # chunks of 8
    both = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembedding).compile()
    found = collectives(both.as_text())
    # The hidden states' gradient is summed once, outside the loop: each device has its columns' part.
    large = [c for c in found if c.bytes > 3 * 8 * 4]
    assert [(c.kind, c.bytes, c.in_loop) for c in large] == [
        ("all-reduce", tokens * width * 4, False)
    ]


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_extreme_logits_are_finite(dtype):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, -jnp.inf, 1.0]], dtype)
    labels = jnp.array([0, 1, 2])

    def loss(logits):
        parts = cross_entropy(logits, labels, z_loss=1e-4)
        return jnp.sum(parts.loss), parts

    (total, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    low = float(logits[1, 0])
    expected = [0.0, math.log(3), math.log(1 + math.exp(-1))]
    # A loss is the difference of two numbers of up to 1e4, each of them rounded.
    np.testing.assert_allclose(parts.loss, expected, rtol=8 * UNIT, atol=2e4 * UNIT)
    np.testing.assert_allclose(parts.log_normalizer[1], low + math.log(3), rtol=2 * UNIT)
    assert bool(jnp.isfinite(total))
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_fused_with_extreme_hidden_states_is_finite():
    hidden, unembedding = np.float32([[1e4], [-1e4]]), np.float32([[1.0, -1.0, 0.5]])
    loss = lambda h: fused_cross_entropy(h, unembedding, np.array([0, 1]))[0]
    loss, grads = jax.jit(jax.value_and_grad(loss))(hidden)
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(grads, 0)


def test_a_row_in_which_nothing_counts_costs_nothing():
    logits = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [-jnp.inf, -jnp.inf]])
    where = jnp.array([[True, True], [False, False], [True, True]])

    def loss(logits):
        parts = cross_entropy(
            logits, jnp.array([0, 1, 0]), where=where, z_loss=1e-2, label_smoothing=0.1
        )
        return jnp.sum(parts.loss + parts.z_loss), parts

    (_, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_array_equal(parts.loss[1:], 0)
    np.testing.assert_array_equal(parts.z_loss[1:], 0)
    np.testing.assert_array_equal(grads[1:], 0)
    assert bool(jnp.all(jnp.isfinite(grads)))
    assert float(log_sum_exp(logits[2])) == -math.inf


def test_nan_logits_make_the_loss_nan():
    logits = np.float32([[np.nan, 1.0], [0.0, 0.0]])
    labels, held = np.array([1, 0]), jax.jit(cross_entropy)
    for loss in (
        held(logits, labels).loss,
        jax.jit(fused_cross_entropy)(logits, np.eye(2, dtype=np.float32), labels)[1].loss,
    ):
        np.testing.assert_array_equal(np.isnan(loss), [True, False])
    assert np.isnan(jax.jit(next_token_loss)(logits[None], labels[None]))
    everywhere = np.full((2, 64), np.nan, np.float32)
    assert np.all(np.isnan(held(everywhere, labels).loss))


def test_parts_by_hand():
    logits = np.log(np.float32([[0.5, 0.25, 0.25]])) + 2
    parts = jitted(cross_entropy, z_loss=0.5)(logits, np.array([1]))
    # Each is computed from numbers of at most 2, with about 8 roundings; squaring doubles the errors.
    close = functools.partial(np.testing.assert_allclose, rtol=16 * UNIT)
    close(parts.loss, math.log(4))  # without the z-loss
    close(parts.log_normalizer, 2.0)
    close(parts.z_loss, 2.0)
    smooth = jitted(cross_entropy, label_smoothing=0.3)(logits, np.array([1]))
    target = np.array([0.1, 0.8, 0.1])
    expected = -float(target @ np.log([0.5, 0.25, 0.25]))
    close(smooth.loss, expected)


def test_documents_end_where_the_next_begins():
    documents = jnp.array([[0, 0, 1, 1, -1], [2, 2, 2, 3, 3]])
    weights = document_weights(documents)
    np.testing.assert_array_equal(weights, [[1, 0, 1, 0], [1, 1, 0, 1]])
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
    targets, loss = rng.integers(0, 5, (2, 4)), jax.jit(next_token_loss)
    inside = loss(logits, targets, documents_BxT1=documents)
    # A mean of eight positive losses in another program, which may be fused differently: 16 units.
    np.testing.assert_allclose(inside, loss(logits, targets, weights), rtol=16 * UNIT)


def test_the_mean_is_over_the_tokens_of_all_devices():
    logits, _, _, _ = problem(8, 1, width=5, dtype=np.float64)
    logits, targets = logits[:, None], np.zeros((8, 1), np.int32)
    weights = np.arange(8, dtype=np.float64)[:, None]  # not a mean of means
    mesh = auto_mesh({"t": 8})
    loss = jax.shard_map(
        functools.partial(next_token_loss, axis_name="t"),
        mesh=mesh,
        in_specs=P("t"),
        out_specs=P(),
    )
    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(next_token_loss))(logits, targets, weights)
        found = jax.jit(jax.value_and_grad(loss))(logits, targets, weights)
    assert furthest(found, expected) <= HALF


def test_labels_out_of_range():
    hidden, unembedding, labels, _ = problem(4, 5)
    bad, ignored = labels.copy(), labels.copy()
    bad[2], ignored[2] = 5, -100
    for function in (naive, fused_cross_entropy):
        with pytest.raises(ValueError, match=r"label 5 at \(2,\) is not in \[0, 5\)"):
            function(hidden, unembedding, bad)
        # Under `jit` labels cannot be checked: a bad one gives NaN, and neither another loss nor zero.
        parts = jax.jit(function)(hidden, unembedding, bad)[1]
        np.testing.assert_array_equal(np.isnan(parts.loss), [False, False, True, False])
    with jax.enable_x64(True):
        hidden, unembedding = hidden.astype(np.float64), unembedding.astype(np.float64)
        weights = np.float64([1, 1, 0, 1])
        expected, _ = jax.jit(naive)(hidden, unembedding, labels, weights)
        loss, _ = jax.jit(fused_cross_entropy)(hidden, unembedding, ignored, weights=weights)
        assert furthest(loss, expected) <= HALF
        loss = jax.jit(next_token_loss)((hidden @ unembedding)[None], ignored[None], weights[None])
    # Token weights are float32 there, and these are represented exactly.
    assert furthest(loss, expected) <= HALF


H, W, L = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: cross_entropy(H, jnp.zeros(3, int)), ValueError, r"\(4, 3\) and \(3,\)"),
        (lambda: cross_entropy(H, jnp.zeros(4)), TypeError, "labels must be integers"),
        (lambda: cross_entropy(H, L, cap=0.0), ValueError, "cap must be positive"),
        (lambda: cross_entropy(H, L, z_loss=-1.0), ValueError, "z_loss must be finite and not neg"),
        (lambda: cross_entropy(H, L, label_smoothing=1.0), ValueError, "label_smoothing must lie"),
        (lambda: fused_cross_entropy(H, W.T, L), ValueError, "transpose of a tied embedding"),
        (lambda: fused_cross_entropy(H, W, L[:3]), ValueError, "hidden must have the shape"),
        (lambda: fused_cross_entropy(H, W, L, weights=L[:3]), ValueError, "weights must have"),
        (lambda: fused_cross_entropy(H, W, L, chunk=0), ValueError, "chunk must be a whole number"),
        (lambda: fused_cross_entropy(H, W, L, vocabulary=6), ValueError, r"vocabulary .* \[1, 5\]"),
        (lambda: fused_cross_entropy(H, W, L, cap=-1.0), ValueError, "cap must be positive"),
        (
            lambda: next_token_loss(H[None], L[None], documents_BxT1=L[None]),
            ValueError,
            "one column more than the targets",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
