"""The certificate of an inverse root accepts what float32 can achieve and detects wrong roots."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ravine.optimizers.matrix.algebra.roots import (
    CoupledNewton,
    CoupledNewtonSchulz,
    Eigh,
    Found,
    inverse_root,
)

from .arrays import single
from .roots import ALL, EXACT, METHODS, attainable, certified, exact, relative, roots_of, spd


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "singular",
    [[[[1.0, 1.0], [1.0, 1.0]]], spd([4, 3, 2, 1, 0, 0]), [np.diag([1.0, 4.0, 0.0])]],
    ids=["ones", "rotated", "diagonal"],
)
def test_singular_matrix_without_ridge_is_not_silent(singular, method, p):
    residual = roots_of(single(singular), -1 / p, METHODS[method], ridge=0.0).residual
    assert residual[0] > 0.1


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("method", EXACT)
def test_google_grid_of_condition_numbers(method, condition):
    """16 x 16, eigenvalues cond^(-i/15), p = 4, ridge 1e-12; the bound is Google's.

    CoupledNewtonSchulz is left out: at 1e6 its ten steps reach only 0.36, and its certificate says so.
    """
    a = single(spd(condition ** (-np.arange(16) / 15)))
    assert roots_of(a, -1 / 4, EXACT[method], ridge=1e-12).residual[0] < 0.1


def test_newton_schulz_below_its_range():
    a = single(spd(1e5 ** (-np.arange(16) / 15)))
    assert roots_of(a, -1 / 4, CoupledNewtonSchulz(), ridge=1e-12).residual[0] < 0.1


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("n", [16, 128])
def test_what_float32_cannot_do_is_refused(n, method, p):
    """With condition number 1e8 and ridge 1e-10, the certificate shows the true residual."""
    a = single(spd(np.geomspace(1e-8, 1, n)))
    assert roots_of(a, -1 / p, METHODS[method], ridge=1e-10).residual[0] > 0.05


@pytest.mark.parametrize("condition", [300, 1e4])
@pytest.mark.parametrize("exponent", [-1 / 2, -1, -2 / 3, -3 / 4])
@pytest.mark.parametrize("method", EXACT)
def test_certificate_accepts_good_roots(method, exponent, condition):
    """Shampoo's default tolerance does not refuse a root that is as good as float32 allows."""
    a = spd(np.geomspace(1 / condition, 1, 12))
    found = roots_of(single(a), exponent, EXACT[method], ridge=0.0)
    bound = -exponent * attainable(condition, 1, method, 12)
    assert relative(found.root, exact(a, exponent)).max() <= bound
    assert found.residual[0] <= 0.1


def off_by(factor):
    def method(matrices, p, ridge, absolute):
        found = Eigh()(matrices, p, ridge, absolute)
        return Found(found.root * factor, *found[1:])

    return method


def test_certificate_sees_a_wrong_root():
    a = single(spd([1, 2, 3, 4]))
    bound = certified(4, 4, n=4)
    assert inverse_root(a, -1 / 4, off_by(1.0)).residual[0] <= bound
    # X^4 is off by 1.05^4 - 1, and X^3, the root of A^2, by 1.05^3 - 1.
    found = inverse_root(a, -1 / 4, off_by(1.05)).residual[0]
    assert found == pytest.approx(1.05**4 - 1, abs=1.05**4 * bound)
    found = inverse_root(a, -2 / 3, off_by(1.05)).residual[0]
    assert found == pytest.approx(1.05**3 - 1, abs=1.05**3 * certified(4**2, 3, n=4))
    assert inverse_root(a, -1 / 4, off_by(math.nan)).residual[0] == jnp.inf
    assert inverse_root(a, -1 / 4, off_by(math.inf)).residual[0] == jnp.inf


def test_certificate_sees_an_iteration_that_stopped_early():
    a = single(spd(np.geomspace(1e-4, 1, 16)))
    for method in (CoupledNewton(max_iterations=5), CoupledNewtonSchulz(steps=3)):
        assert roots_of(a, -1 / 2, method).residual[0] > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ALL)
def test_matrix_that_is_not_finite_harms_only_itself(method, bad):
    a = np.concatenate([spd(np.geomspace(0.1, 1, 8), seed) for seed in range(3)])
    spoiled = a.copy()
    spoiled[1, 2, 3] = spoiled[1, 3, 2] = bad
    found, reference = (roots_of(single(x), -1 / 4, ALL[method]) for x in (spoiled, a))
    assert found.residual[1] == jnp.inf
    for at in (0, 2):
        np.testing.assert_array_equal(found.root[at], reference.root[at])
        assert found.residual[at] == reference.residual[at] <= certified(10, 4, method, 8)


@pytest.mark.parametrize("at", [(0, 0), (7, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_nan_on_the_diagonal(method, at):
    a = spd(np.geomspace(0.1, 1, 8))
    a[0][at] = math.nan
    assert roots_of(single(a), -1 / 4, METHODS[method]).residual[0] == jnp.inf
