"""Orthogonalization: the effect of the iterations on singular values, their forms, and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from ravine.optimizers.matrix.algebra import polar as polar_file
from ravine.optimizers.matrix.algebra.coefficients import (
    PRESETS,
    check_coefficients,
    named_coefficients,
    polar_express,
    scalar_map,
)
from ravine.optimizers.matrix.algebra.newton_schulz import cheapest, symmetric_product
from ravine.optimizers.matrix.algebra.polar import NewtonSchulz, polar_factor
from ravine.optimizers.matrix.batch.batches import map_matrices

from .newton_schulz import of_bfloat16, relative_norm
from .tolerances import HALF, furthest

LAST_DIGIT = 0.5e-6  # half a unit of the last of six digits
# Where the iteration maps singular values in [0.01, 1].
BANDS = {"keller": (0.68, 1.14), "quintic": (0.97, 1.04), "polar_express": (0.85, 1.15)}
STEPS = {"keller": range(1, 11), "quintic": [5], "cubic": [5], "polar_express": range(5, 11)}


def matrices(shape, smallest=0.01, seed=0):
    """Matrices [K, m, n] with singular values from `smallest` to 1 in a geometric sequence."""
    rng = np.random.default_rng(seed)
    count, rows, columns = shape
    rank = min(rows, columns)
    made = []
    for _ in range(count):
        left, right = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in (rows, columns))
        made.append((left * np.geomspace(smallest, 1, rank)) @ right.T)
    return np.stack(made).astype(jnp.zeros(0).dtype)  # float64 in tests that enable it


def compiled(*args, **options):
    return jax.jit(NewtonSchulz(*args, **options))


def largest_difference(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("preset", ["keller", "quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 1024)])
def test_gram_form_equals_the_standard_form(shape, preset):
    x = matrices((1, *shape))
    standard, gram = (compiled(preset, form=form)(x) for form in ("standard", "gram"))
    assert furthest(gram, standard) <= HALF


@pytest.mark.parametrize("preset", BANDS)
def test_singular_values_land_in_the_band(preset):
    low, high = BANDS[preset]
    values = scalar_map(named_coefficients(preset, 5), np.linspace(0.01, 1, 10001))
    assert low <= values.min()
    assert values.max() <= high
    sigma = np.geomspace(0.01, 0.9, 32)
    diagonal = np.float32(np.diag(sigma / np.linalg.norm(sigma)))[None]
    inside = np.diagonal(diagonal[0]) >= 0.01
    found = np.diagonal(compiled(preset)(diagonal)[0])[inside]
    assert low <= found.min()
    assert found.max() <= high


def test_polar_express_lifts_small_singular_values():
    assert scalar_map(polar_express(), np.array([0.001]))[0] >= 0.7


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("keller", (0.722876, 1.119204)),
        ("quintic", (1.018629, 1.005632)),
        ("cubic", (0.901862, 0.796534)),
    ],
)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_diagonal_matrix_of_three_and_four(preset, expected, form):
    found = compiled(preset, form=form)(np.diag([3.0, 4.0])[None])[0]
    np.testing.assert_allclose(found, np.diag(expected), rtol=0, atol=LAST_DIGIT)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("preset", "expected"), [("keller", 0.696436), ("quintic", 0.978346)])
def test_rank_one_matrix(preset, expected):
    unit_rows, unit_columns = np.array([0.6, 0.8]), np.array([2.0, 3.0, 6.0]) / 7
    outer = np.outer(unit_rows, unit_columns)
    found = compiled(preset)(50 * outer[None])[0]
    np.testing.assert_allclose(found, expected * outer, rtol=0, atol=LAST_DIGIT)


def test_polar_express_table_is_the_published_one():
    published = (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.875, -1.25, 0.375),
    )
    np.testing.assert_allclose(polar_express(8), published, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_bfloat16_is_near_float32(form):
    """Within twice the effect of random rounding on the same products."""
    x = matrices((2, 64, 256))
    low = compiled(dtype="bfloat16", form=form)(x)
    assert low.dtype == jnp.float32
    assert relative_norm(low, compiled(form=form)(x)) <= 2 * of_bfloat16(x, form)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_scale_makes_no_difference(scale):
    x = matrices((1, 16, 24))
    assert largest_difference(compiled()(scale * x), compiled()(x)) <= HALF


@pytest.mark.usefixtures("float64")
def test_transposed_matrix_has_the_transposed_factor():
    x = matrices((2, 16, 24))
    turned = compiled()(x.swapaxes(1, 2)).swapaxes(1, 2)
    assert largest_difference(turned, compiled()(x)) <= HALF


@pytest.mark.usefixtures("float64")
def test_batch_equals_loop_and_chunks_equal_the_whole():
    pieces = [matrices((5, 8, 12), seed=1), matrices((2, 12, 8), seed=2), matrices((1, 8, 8))]
    polar, alone = NewtonSchulz(), compiled()
    whole = jax.jit(lambda p: map_matrices(polar, p))(pieces)
    for piece, result in zip(pieces, whole, strict=True):
        one_by_one = np.concatenate([alone(matrix[None]) for matrix in piece])
        assert largest_difference(result, one_by_one) <= HALF
    for bound in (1, 2 * 8 * 12, 3 * 8 * 12):  # seven matrices: one, two or three at a time
        chunked = jax.jit(lambda p, bound=bound: map_matrices(polar, p, bound))(pieces)
        for result, part in zip(whole, chunked, strict=True):
            assert largest_difference(result, part) <= HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("nesterov", [False, True])
def test_mean_and_sum_have_the_same_directions(nesterov):
    heavy = optax.chain(ravine.scale_by_momentum(0.95, nesterov=nesterov), ravine.orthogonalize())
    mean = optax.chain(
        ravine.scale_by_ema_momentum(0.95, nesterov=nesterov), ravine.orthogonalize()
    )
    params = jnp.zeros((8, 12))
    states = [tx.init(params) for tx in (heavy, mean)]
    updates = [jax.jit(tx.update) for tx in (heavy, mean)]
    for seed in range(3):
        grads = matrices((1, 8, 12), seed=seed)[0]
        one, states[0] = updates[0](grads, states[0])
        other, states[1] = updates[1](grads, states[1])
        assert largest_difference(one, other) <= HALF


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_zero_gives_zero_and_nan_stays_in_its_matrix(form):
    x, polar = matrices((3, 8, 12)), compiled(form=form)
    x[0] = 0
    clean = polar(x)
    assert np.all(clean[0] == 0)
    assert np.all(np.isfinite(clean))
    spoiled = x.copy()
    spoiled[1, 0, 0] = np.nan
    dirty = polar(spoiled)
    assert np.all(np.isnan(dirty[1]))
    np.testing.assert_array_equal(dirty[0::2], clean[0::2])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_a_zero_matrix_leaves_derivatives_of_the_others_what_they_are(form):
    x = matrices((3, 8, 12))
    slope = jax.jit(jax.grad(lambda x: jnp.sum(NewtonSchulz(form=form)(x) ** 3)))
    alone = slope(x[1:])
    x[0] = 0
    beside = slope(x)
    assert np.all(np.isfinite(beside[0]))
    assert largest_difference(beside[1:], alone) <= HALF * np.max(np.abs(alone))


@pytest.mark.usefixtures("float64")
def test_many_steps_reach_the_singular_value_decomposition():
    x = matrices((2, 32, 48))
    exact = jax.jit(polar_factor)(x)
    found = compiled("polar_express", steps=8)(x)
    values = np.geomspace(0.01, 1, 32)
    mapped = scalar_map(polar_express(8), values / np.linalg.norm(values))
    assert largest_difference(found, exact) <= np.abs(mapped - 1).max() + HALF


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 13])
def test_symmetric_product_is_the_full_one_and_symmetric(size, depth):
    x = matrices((2, size, 21))
    product = lambda x: symmetric_product(x, x.swapaxes(1, 2), depth, precision="highest")
    found = np.asarray(jax.jit(product)(x))
    full = x @ x.swapaxes(1, 2)
    assert largest_difference(found, full) <= HALF
    below = found.shape[1] // 2
    np.testing.assert_array_equal(found[:, below:, :below], found[:, :below, below:].swapaxes(1, 2))


@pytest.mark.usefixtures("float64")
def test_halvings_make_no_difference_to_the_iterations():
    x = matrices((1, 33, 65))
    for form in ("standard", "gram"):
        whole, halved = (compiled(form=form, halvings=n)(x) for n in (0, 2))
        assert furthest(halved, whole) <= HALF


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_matrices_in_halves_have_the_same_factors(form, monkeypatch):
    x = matrices((2, 32, 48))
    whole = np.asarray(compiled(form=form)(x))
    monkeypatch.setattr(polar_file, "SMALLEST_HALF", 16)
    products = str(jax.make_jaxpr(NewtonSchulz(form=form))(x))
    assert "f32[2,16,16]" in products
    assert "f32[2,32,32]" not in products
    found = np.asarray(jax.jit(NewtonSchulz(form=form))(x))
    assert np.linalg.norm(found - whole) <= 1e-5 * np.linalg.norm(whole)


def test_wide_matrices_take_the_gram_form_and_square_ones_the_standard():
    steps = named_coefficients("keller", 5)
    assert cheapest(64, 1024, steps, (3,)) == "gram"
    assert cheapest(64, 64, steps, (3,)) == "standard"


@pytest.mark.parametrize(
    ("preset", "steps"), [(preset, n) for preset, allowed in STEPS.items() for n in allowed]
)
def test_presets_stay_positive_and_bounded(preset, steps):
    values = scalar_map(named_coefficients(preset, steps), np.linspace(1e-6, 1, 100_003))
    assert values.min() > 0
    assert values.max() <= 1.5


def test_every_preset_is_tested():
    assert set(STEPS) == set(PRESETS)


@pytest.mark.parametrize(
    ("preset", "steps", "message"),
    [
        ("keller", 0, "steps must be a whole number of at least 1, got 0"),
        ("quintic", 4, "tuned for 5"),
        ("cubic", 6, "tuned for 5"),
        ("polar_express", 0, "steps must be a whole number of at least 1"),
        ("polar_express", 1, r"the singular value 1 to 1\.99, outside \(0, 1\.5\]"),
        ("polar_express", 4, r"with 4 steps maps .* outside \(0, 1\.5\]; take another"),
        ("septic", 5, "unknown coefficients 'septic'"),
    ],
)
def test_presets_refuse(preset, steps, message):
    with pytest.raises(ValueError, match=message):
        NewtonSchulz(preset, steps=steps)


def test_a_table_that_turns_negative_is_refused():
    # NeMo's "aol", which is meant for another normalization.
    table = (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    )
    complaint = r"coefficients with 4 steps maps the singular value .* to -.*, outside \(0, 1\.5\]"
    with pytest.raises(ValueError, match=complaint):
        check_coefficients(table)
    with pytest.raises(ValueError, match=complaint):
        NewtonSchulz(table)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
        ({"form": "fast"}, "form must be one of 'auto', 'standard', 'gram', got 'fast'"),
        ({"restarts": (0,)}, "restarts must be steps of at least 1"),
        ({"halvings": -1}, "halvings must be a whole number of at least 0"),
        ({"lower": 2.0}, r"lower and cushion in \(0, 1\) .* got .*lower=2\.0"),
        ({"distribution": "half"}, "distribution must be one of .*, got 'half'"),
    ],
    ids=str,
)
def test_other_bad_values_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        NewtonSchulz(**({"coefficients": "polar_express"} | bad))


def test_a_vector_is_refused_with_its_path_and_shape():
    with pytest.raises(ValueError, match=r"(?s)layer/bias.*\(3,\)|\(3,\).*layer/bias"):
        ravine.orthogonalize().init({"layer": {"bias": jnp.zeros(3)}})
