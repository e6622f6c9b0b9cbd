"""Clipping: by hand, per layer, and against the authors' own code (`golden/clipping.py`)."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ravine import stability as s

from .run_rounding import rounding_of
from .tolerances import UNIT, furthest

GOLDEN = json.loads((Path(__file__).parent / "golden" / "clipping.json").read_text())
EVERY = {
    "clip_by_global_norm": lambda: s.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: s.clip_by_block_rms(1.0),
    "with_update_clipping": lambda: s.with_update_clipping(ravine.scale_by_adam()),
    "clip_adaptively": lambda: s.clip_adaptively(),
    "adagc": lambda: s.adagc(warmup=2),
    "zclip": lambda: s.zclip(warmup=2),
    "spam": lambda: s.spam(ravine.scale_by_adam(), reset_every=3, rewarm=2, settle=1),
    "clip_update_norm": lambda: s.clip_update_norm(warmup=2),
}
every = pytest.mark.parametrize("name", EVERY)
WHOLE_TREE = ("clip_by_global_norm", "zclip", "clip_update_norm")
LEARNS_FROM_NORMS = [
    "clip_by_global_norm",
    "clip_by_block_rms",
    "clip_adaptively",
    "adagc",
    "zclip",
]


def tree(seed=0, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"layers": {"kernel": (3, 4, 5), "scale": (3, 4)}, "head": (4, 6), "bias": (6,)}
    make = lambda shape: jnp.array((scale * rng.normal(size=shape)).astype(dtype))
    return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(tx, gradients, params):
    """All updates, and the final state."""
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        found.append(updates)
    return found, state


@every
def test_state_is_constant_and_bfloat16_stays_near_float32(name):
    tx, params = EVERY[name](), tree()
    gradients = [tree(seed, scale=10.0**seed) for seed in range(1, 5)]
    found, state = run(tx, gradients, params)
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, state) == jax.tree.map(shape, tx.init(params))
    low = [jax.tree.map(lambda g: g.astype(jnp.bfloat16), g) for g in gradients]
    for a, b in zip(run(tx, low, params)[0], found, strict=True):
        assert {x.dtype for x in jax.tree.leaves(a)} == {jnp.dtype(jnp.bfloat16)}
        # Five values are rounded to 8 bits: the gradient, the result, the norm (through the gradients),
        # and the statistics of earlier norms or second moments.
        assert furthest(jax.tree.map(lambda x: x.astype(jnp.float32), a), b) <= 5 * 2.0**-8


@pytest.mark.parametrize("name", [name for name in EVERY if name not in WHOLE_TREE])
def test_stacked_layers_are_clipped_one_by_one(name):
    """Clipped like a dictionary of its layers; clipping the whole would give another result."""
    stacked = lambda t: {"layers": {"kernel": t["layers"]["kernel"]}}
    apart = lambda t: {str(i): t["layers"]["kernel"][i] for i in range(3)}
    uneven = jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    gradients = []
    for seed in range(1, 5):
        grads = tree(seed)
        grads["layers"]["kernel"] *= uneven**seed
        gradients.append(grads)
    params = tree()
    one, _ = run(EVERY[name](), list(map(stacked, gradients)), stacked(params))
    other, _ = run(EVERY[name](), list(map(apart, gradients)), apart(params))
    for a, b in zip(one, other, strict=True):
        together = jnp.stack([b[str(i)] for i in range(3)])
        # Both sum at most 20 squares and take the root; then the average goes through four updates.
        np.testing.assert_allclose(a["layers"]["kernel"], together, rtol=(20 + 4 * 3) * UNIT)


@pytest.mark.parametrize("name", LEARNS_FROM_NORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_pass_through_and_the_statistics_skip_them(name, value):
    tx, params = EVERY[name](), tree()
    good = [tree(seed) for seed in range(1, 4)]
    bad = tree(9)
    bad["head"] = bad["head"].at[1, 2].set(value)
    found, state = run(tx, [*good, bad], params)
    _, before = run(tx, good, params)
    for x, old in zip(jax.tree.leaves(found[-1]), jax.tree.leaves(bad), strict=True):
        np.testing.assert_array_equal(jnp.isfinite(x), jnp.isfinite(old))
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_global_norm_neither_overflows_nor_depends_on_the_mesh():
    tx = s.clip_by_global_norm(1.0)
    grads = jnp.full(100, 300.0, jnp.float16)
    clipped, _ = tx.update(grads, tx.init(grads))
    # A sum of a hundred squares and its root in float32, then a rounding to float16.
    rtol = 2.0**-11 + 64 * UNIT
    np.testing.assert_allclose(clipped.astype(jnp.float32), 0.1, rtol=rtol)
    np.testing.assert_array_equal(optax.clip_by_global_norm(1.0).update(grads, None)[0], 0)
    huge = jnp.full(16, 1e30)  # finite, but its squares are not
    np.testing.assert_allclose(tx.update(huge, tx.init(huge))[0], 0.25, rtol=16 * UNIT)
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
    grads = jnp.arange(16.0)
    sharded = jax.device_put(grads, NamedSharding(mesh, P("x")))
    found, _ = jax.jit(tx.update)(sharded, tx.init(grads))
    np.testing.assert_allclose(found, tx.update(grads, tx.init(grads))[0], rtol=24 * UNIT)
    small = jnp.array([0.3, 0.4])
    np.testing.assert_array_equal(tx.update(small, tx.init(small))[0], small)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["clip_by_block_rms", "clip_adaptively", "adagc"])
def test_finite_gradients_whose_squares_overflow_are_clipped(name, dtype):
    """They passed as they were, as non-finite ones do."""
    tx, params = EVERY[name](), tree(dtype=dtype)
    grads = [tree(seed, dtype, 1e-3) for seed in range(1, 4)]
    spike = tree(9, dtype, 1e-3)
    spike["layers"]["kernel"] = spike["layers"]["kernel"].at[1, 2, 3].set(1e25)
    (*_, found), state = run(tx, [*grads, spike], params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found, state)))
    assert float(jnp.abs(found["layers"]["kernel"]).max()) < 5
    if name == "clip_by_block_rms":  # the other layers are below its bound
        kernels = found["layers"]["kernel"], spike["layers"]["kernel"]
        np.testing.assert_array_equal(*(kernel[jnp.array([0, 2])] for kernel in kernels))
    vmapped = jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0])
    both = vmapped(jax.tree.map(lambda *x: jnp.stack(x), grads[0], spike))
    assert all(bool((jnp.abs(x) < 5).all()) for x in jax.tree.leaves(both))


def test_clip_adaptively_by_hand():
    w = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    g = jnp.array([[0.0, 3.0], [10.0, 4.0]])
    tx = s.clip_adaptively(0.1, eps=0.2)
    clipped, _ = tx.update(g, tx.init(w), w)
    # Columns: 10 against 0.1 * 5, and 5 against 0.1 * 0.2. Two norms, two products and a quotient.
    np.testing.assert_allclose(clipped, [[0.0, 0.012], [0.5, 0.016]], rtol=8 * UNIT)
    heads = jnp.ones((4, 2, 3))
    tx = s.clip_adaptively(0.1, inputs=lambda path: (-3,))
    clipped, _ = tx.update(heads, tx.init(heads), heads)
    np.testing.assert_allclose(clipped, 0.1, rtol=8 * UNIT)


def test_update_clipping_is_that_of_the_paper():
    b1, b2, eps = 0.9, 0.95, 1e-6
    tx = s.with_update_clipping(ravine.scale_by_adam(b1, b2, eps), b2, eps)
    theirs = s.with_update_clipping(optax.scale_by_adam(b1, b2, eps), b2, eps)
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=5) * 10.0 ** (seed % 3) for seed in range(12)]
    m = v = 0.0
    expected = []
    for t, g in enumerate(gradients, start=1):
        # Algorithm 2 corrects the betas instead of the moments.
        beta1 = b1 * (1 - b1 ** (t - 1)) / (1 - b1**t)
        beta2 = b2 * (1 - b2 ** (t - 1)) / (1 - b2**t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
        expected.append(m / (np.sqrt(v) + eps) / max(1.0, rms))
    gradients = [jnp.asarray(g, jnp.float32) for g in gradients]
    for transformation in (tx, theirs):
        with jax.numpy_dtype_promotion("standard"):  # Optax's needs it
            found, _ = run(transformation, gradients, jnp.zeros(5))
        # Three roundings per update of a moment. In addition 1 - b^t magnifies a rounding of b^t ten
        # times (first moment, once) and twenty times (second moment, twice, halved by the root).
        bound = (3 * 12 + 10 + 2 * 20 / 2 + 8) * UNIT
        assert furthest(found, expected) <= bound
    with pytest.raises(ValueError, match="needs a direction whose state has one second moment"):
        s.with_update_clipping(ravine.scale_by_lion()).init(jnp.zeros(3))


def golden_gradients():
    return [
        {k: jnp.asarray(g, jnp.float32) for k, g in grads.items()} for grads in GOLDEN["gradients"]
    ]


def arrays(rows):
    return [{k: np.array(x) for k, x in row.items()} for row in rows]


def test_zclip_is_that_of_its_authors():
    theirs = GOLDEN["zclip"]["arguments"]
    tx = s.zclip(
        theirs["z_thresh"],
        theirs["alpha"],
        max_norm=theirs["max_grad_norm"],
        warmup=theirs["warmup_steps"],
        eps=theirs["eps"],
    )
    given = golden_gradients()
    clip = lambda gradients: run(tx, gradients, jax.tree.map(jnp.zeros_like, given[0]))[0]
    expected = arrays(GOLDEN["zclip"]["clipped"])
    bound = rounding_of(clip, given)
    assert furthest(clip(given), expected) <= bound
    is_clipped = [furthest(e, g) > bound for e, g in zip(expected, given, strict=True)]
    assert 0.1 < np.mean(is_clipped) < 0.9


def test_zclip_by_hand_where_no_bound_hides_its_rule():
    norms, threshold, decay = [1.0, 1.5, 1.25, 4.0, 1.25, 9.0, 1.5], 2.0, 0.75
    mean, variance = np.mean(norms[:3]), np.var(norms[:3])
    expected = norms[:3]
    for norm in norms[3:]:
        deviation = np.sqrt(variance)
        z = (norm - mean) / deviation
        clipped = mean + threshold**2 * deviation / z if z > threshold else norm
        expected.append(clipped)
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
    assert np.sum(np.not_equal(expected, norms)) == 2
    tx = s.zclip(threshold, decay, max_norm=None, warmup=3, eps=1e-12)
    found, _ = run(tx, [jnp.array([norm]) for norm in norms], jnp.zeros(1))
    # Seven steps with twenty roundings each.
    np.testing.assert_allclose(np.ravel(found), expected, rtol=140 * UNIT)


def test_adagc_by_hand_and_with_gradients_that_start_at_zero():
    tx = s.adagc(1.05, 0.5, warmup=2, warmup_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = [(3.0, 4.0), (0.3, 0.0), (2.0, 0.4), (2.0, 0.4)]
    made = [{"a": jnp.array([a]), "b": jnp.array([b])} for a, b in gradients]
    found, _ = run(tx, made, params)
    # Clipped to norm 1 as a whole; within bounds, so unchanged; 1.05 times the smallest norm so far,
    # ignoring the zero norm of b; then the mean of the usual norm and the clipped one.
    a3 = 1.05 * 0.3
    a4 = 1.05 * (0.5 * 0.3 + 0.5 * a3)
    expected = [(0.6, 0.8), (0.3, 0.0), (a3, 0.4), (a4, 0.4)]
    np.testing.assert_allclose([(f["a"][0], f["b"][0]) for f in found], expected, rtol=12 * UNIT)


def test_spam_is_that_of_its_authors():
    theirs = GOLDEN["spam"]["arguments"]
    assert theirs["lr"] == 1.0
    tx = s.spam(
        ravine.scale_by_adam(*theirs["betas"], theirs["eps"]),
        threshold=theirs["threshold"],
        reset_every=theirs["DeltaT"],
        rewarm=theirs["warmup_steps"],
        settle=theirs["grad_accu_steps"],
    )
    given = golden_gradients()
    zeros = jax.tree.map(jnp.zeros_like, given[0])
    found, _ = run(tx, given, zeros)
    params = [zeros, *arrays(GOLDEN["spam"]["parameters"])]
    expected = [
        {k: np.asarray(old[k]) - new[k] for k in new} for old, new in itertools.pairwise(params)
    ]
    # Moments last for 12 updates with three roundings each, which the root halves for the second moment.
    # In addition 1 - b^t magnifies a rounding of b^t up to 10 and 100 times.
    bound = (12 * 3 * 1.5 + 10 + 100 / 2 + 8) * UNIT
    assert furthest(found, expected) <= bound


def test_spam_lets_late_elements_start():
    tx = s.spam(ravine.scale_by_adam(), settle=2)
    gradients = [jnp.array([1.0, 0.0])] * 4 + [jnp.array([1.0, 1.0])] * 2
    found, _ = run(tx, gradients, jnp.zeros(2))
    assert float(found[-1][1]) > 0.1


def test_clipped_updates_do_not_lower_the_limit_to_nothing():
    tx = s.clip_update_norm(warmup=4, window=8, deviations=2.0)
    found, _ = run(tx, [jnp.array([u]) for u in [1.0] * 6 + [5.0] * 20], jnp.zeros(1))
    norms = np.ravel(found)
    assert norms[6] == pytest.approx(1.02, rel=8 * UNIT)
    assert norms[-1] == 5.0  # the new level


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: s.clip_by_global_norm(0.0), "max_norm must be positive"),
        (lambda: s.clip_by_block_rms(-1.0), "max_rms must be positive"),
        (lambda: s.clip_adaptively(0.0), "ratio must be positive"),
        (lambda: s.adagc(0.9), "ratio must be at least 1"),
        (lambda: s.adagc(decay=1.0), "decay must lie in"),
        (lambda: s.zclip(warmup=0), "warmup must be a whole number"),
        (lambda: s.zclip(float("nan")), "z_threshold must be a finite number"),
        (lambda: s.spam(ravine.scale_by_adam(), threshold=0.0), "threshold must be positive"),
        (lambda: s.spam(ravine.scale_by_adam(), reset_every=0), "reset_every must be a whole"),
        (lambda: s.spam(optax.identity()).init(jnp.zeros(1)), "spam needs a direction"),
        (lambda: s.clip_update_norm(window=0), "window must be a whole number"),
        (lambda: s.clip_update_norm(window=8), "warmup must be at most the window of 8"),
        (
            lambda: s.clip_by_block_rms(layers=s.Stacked("", 3)).update(jnp.ones((2, 2)), None),
            "no axis 3 of layers",
        ),
        (lambda: s.clip_adaptively().update(jnp.ones(1), None), "clip_adaptively needs the param"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
