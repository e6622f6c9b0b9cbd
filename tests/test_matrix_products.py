"""Products are done as a platform does them best, and give the same on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from ravine.optimizers.matrix.algebra import kronecker, newton_schulz, polar
from ravine.optimizers.matrix.algebra.kronecker import mode_gram, mode_grams

BF16, F32, F64 = (jnp.dtype(name) for name in ("bfloat16", "float32", "float64"))


def power_law(*shape: int) -> np.ndarray:
    """Matrices with singular values that fall as 1/k, in float64."""
    left, _, right = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    return (left / np.arange(1, min(shape[-2:]) + 1)) @ right


def products(function, *arguments) -> list:
    """The products in a traced function, those in loops included."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation)
            for each in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments).jaxpr)
    return found


def run_on(monkeypatch, platform: str) -> None:
    for module in (kronecker, polar):
        monkeypatch.setattr(module, "platform", lambda: platform)


@pytest.mark.parametrize(
    ("shape", "order", "axis"),
    [
        *(((2, 24, 40), 2, axis) for axis in (0, 1)),
        *(((1, 3, 25, 7), 2, axis) for axis in (0, 1)),
        *(((2, 2, 6, 5, 8), 3, axis) for axis in (0, 1, 2)),
    ],
)
def test_halved_gram_matrices_are_whole_ones(shape, order, axis, monkeypatch):
    monkeypatch.setattr(newton_schulz, "SMALLEST_STRIP", 1)
    newton_schulz.halvings.cache_clear()
    x = power_law(*shape)
    at = len(shape) - order + axis
    unfolded = np.moveaxis(x, at, -1)
    unfolded = unfolded.reshape(*shape[:-order], -1, shape[at])
    expected = np.swapaxes(unfolded, -1, -2) @ unfolded
    try:
        found = mode_gram(jnp.asarray(x, jnp.float32), axis, order)
        assert len(products(lambda x: mode_gram(x, axis, order), jnp.asarray(x, jnp.float32))) > 1
    finally:
        newton_schulz.halvings.cache_clear()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=unfolded.shape[-2] * 2.0**-24 * scale)


def test_only_long_gram_matrices_are_halved_and_only_on_cpu(monkeypatch):
    grams = lambda x: mode_grams(x, (0, 1), 2)
    square, long = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 512), (512, 2048)))
    assert len(products(grams, square)) == 2
    # Both in halves: half of the rows times what is summed over is 2^19.
    assert len(products(grams, long)) == 2 + 2
    run_on(monkeypatch, "tpu")
    assert len(products(grams, long)) == 2


@pytest.mark.parametrize(
    ("platform", "precision"), [("tpu", "HIGH"), ("gpu", "HIGHEST"), ("cpu", "HIGHEST")]
)
def test_statistics_take_three_passes_on_tpu(platform, precision, monkeypatch):
    run_on(monkeypatch, platform)
    (found,) = products(lambda x: mode_gram(x, 0, 2), jnp.ones((4, 4)))
    assert found.params["precision"] == (jax.lax.Precision[precision],) * 2


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_newton_schulz_is_in_bfloat16_on_accelerators(platform, monkeypatch):
    run_on(monkeypatch, platform)
    tx, params = ravine.scale_by_muon(), {"w": jnp.ones((32, 64))}
    found = products(tx.update, params, tx.init(params))
    assert {x.aval.dtype for equation in found for x in equation.invars} == {BF16}
    assert {x.aval.dtype for equation in found for x in equation.outvars} == {F32}
    # As if asked for, where the form depends on the dtype too.
    asked = ravine.scale_by_muon(polar=ravine.NewtonSchulz(dtype="bfloat16"))
    again = products(asked.update, params, asked.init(params))
    assert list(map(str, found)) == list(map(str, again))


@pytest.mark.parametrize(("given", "expected"), [(None, F32), ("bfloat16", BF16)])
def test_newton_schulz_is_in_float32_on_cpu_unless_asked(given, expected):
    polar_factor = ravine.NewtonSchulz(dtype=given)
    found = products(polar_factor, jnp.ones((1, 32, 64)))
    assert {x.aval.dtype for equation in found for x in equation.invars} == {expected}


def test_matrices_in_float64_are_not_rounded_on_accelerators(monkeypatch, float64):
    run_on(monkeypatch, "gpu")
    found = products(ravine.NewtonSchulz(), jnp.ones((1, 8, 16), F64))
    assert {x.aval.dtype for equation in found for x in equation.invars} == {F64}
