"""Inverse roots against exact ones: every method, exponent, condition, scale, size and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.optimizers.matrix.algebra.root_parts import largest_eigenvalue
from ravine.optimizers.matrix.algebra.roots import (
    CoupledNewton,
    CoupledNewtonSchulz,
    Eigh,
    PseudoInverse,
    inverse_root,
)
from ravine.optimizers.matrix.algebra.roots_by_products import cubic_steps

from .arrays import single
from .roots import (
    ALL,
    EXACT,
    METHODS,
    attainable,
    certified,
    exact,
    relative,
    roots_of,
    spd,
    unfinished,
)
from .tolerances import HALF, UNIT

# The roots that each method offers among those the references test.
OFFERED = [
    (method, p) for method in METHODS for p in (1, 2, 4, 8) if method != "schulz" or p in (2, 4)
]
TEN = tuple(10.0**power for power in range(-3, 3))


def tridiagonal(n, pairs):
    off = np.eye(n, k=1) + np.eye(n, k=-1)
    return np.stack([alpha * np.eye(n) + beta * off for alpha, beta in pairs])


@pytest.mark.parametrize("method", [*METHODS.values(), PseudoInverse()], ids=repr)
def test_metas_badly_conditioned_matrix(method):
    """The example and bounds are Meta's own: condition number 7e5."""
    a = single([[[1195, -944, -224], [-944, 746, 177], [-224, 177, 42]]])
    expected = [[[1, 1, 1], [1, 2, -3], [1, -3, 18]]]
    root = roots_of(a, -1 / 2, method, ridge=0.0).root
    np.testing.assert_allclose(root, expected, atol=0.05, rtol=1e-2)


@pytest.mark.parametrize("method", EXACT)
def test_metas_badly_conditioned_inverse(method):
    a = single([[[1195, -944, -224], [-944, 746, 177], [-224, 177, 42]]])
    expected = [[[3, 0, 16], [0, 14, -59], [16, -59, 334]]]
    found = roots_of(a, -1.0, EXACT[method], ridge=0.0)
    np.testing.assert_allclose(found.root, expected, atol=0.05, rtol=1e-2)
    assert found.condition[0] == pytest.approx(6.846e5, rel=1e-2)


@pytest.mark.parametrize("method", ALL)
def test_diagonal_matrix_of_one_and_four(method):
    found = roots_of(single([np.diag([1, 4])]), -1 / 2, ALL[method], ridge=0.0)
    assert relative(found.root, np.diag([1, 0.5])[None]).max() <= attainable(4, 2, method, 2)
    assert found.residual[0] <= certified(4, 2, method, 2)
    # 24 power iterations leave a share of (1/4)^48 from the smaller eigenvalue.
    assert found.condition[0] == pytest.approx(4, rel=2 * certified(4, 2, method, 2))


@pytest.mark.parametrize(("method", "p"), OFFERED)
@pytest.mark.parametrize("n", [10, 100])
def test_tridiagonal_grid(method, n, p):
    pairs = [(alpha, beta) for alpha in TEN for beta in (0.0, *TEN) if 2 * beta <= alpha]
    matrices = tridiagonal(n, pairs)
    root = roots_of(single(matrices), -1 / p, METHODS[method], ridge=0.0).root
    # The eigenvalues lie within alpha -+ 2 beta, and beta is at most a tenth of alpha.
    bound = attainable(1.2 / 0.8, p, method, n)
    assert relative(root, exact(matrices, -1 / p)).max() <= bound


@pytest.mark.parametrize(("method", "p"), OFFERED)
def test_tridiagonal_at_the_edge(method, p):
    """beta = alpha/2, a condition number of 4134 for n = 100."""
    matrices = tridiagonal(100, [(alpha, alpha / 2) for alpha in TEN])
    root = roots_of(single(matrices), -1 / p, METHODS[method], ridge=0.0).root
    bound = attainable(np.linalg.cond(matrices[0]), p, method, 100)
    assert relative(root, exact(matrices, -1 / p)).max() <= bound


def test_pseudo_inverse_leaves_out_the_null_space():
    found = roots_of(single([np.diag([1, 4, 0])]), -1 / 2, PseudoInverse())
    assert relative(found.root, np.diag([1, 0.5, 0])[None]).max() <= attainable(4, 2)
    assert found.residual[0] <= certified(4, 2)
    # Four units of the largest eigenvalue in the smallest one, and the rounding of their quotient.
    assert found.condition[0] == pytest.approx(4, rel=attainable(4, 1))


def test_pseudo_inverse_of_a_rotated_singular_matrix():
    values = np.array([3.0, 2.0, 1.0, 0.5, 0, 0, 0, 0])
    power = np.where(values > 0, np.maximum(values, 0.1) ** -0.25, 0)
    found = roots_of(single(spd(values)), -1 / 4, PseudoInverse(rtol=1e-4))
    # Rounding also rotates the null space towards the smallest kept eigenvalue, by 6 units for any p.
    assert relative(found.root, spd(power)).max() <= attainable(6, 1)
    assert found.residual[0] <= 4 * 6 ** (1 / 4) * attainable(6, 1)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(
    "method", [Eigh(), CoupledNewton(tolerance=1e-12), CoupledNewtonSchulz()], ids=repr
)
@pytest.mark.parametrize("size", [4, 32])
def test_padding_makes_no_difference(size, method, p):
    """Padding does not change the estimate of the largest eigenvalue either, nor the ridge."""
    a = 1e-3 * spd(np.geomspace(1e-3, 1, size))
    padded = np.random.default_rng(0).normal(size=(1, 2 * size, 2 * size))
    padded[:, :size, :size] = a
    with jax.enable_x64(True):
        alone = roots_of(jnp.asarray(a), -1 / p, method, ridge=1e-3)
        found = roots_of(
            jnp.asarray(padded), -1 / p, method, ridge=1e-3, size=jnp.array([size], jnp.int32)
        )
    assert relative(found.root[:, :size, :size], alone.root).max() <= HALF
    assert not np.any(found.root[:, size:])
    assert not np.any(found.root[:, :, size:])
    bound = 4 * 1e3 ** (1 / 4) * unfinished("schulz", 1e3, p, size)
    assert float(found.residual[0]) <= max(HALF, float(bound))


@pytest.mark.parametrize("method", METHODS)
def test_all_padding_has_the_root_zero(method):
    a = single(np.random.default_rng(0).normal(size=(2, 4, 4)))
    a = a.at[1].set(jnp.eye(4))
    found = roots_of(a, -1 / 4, METHODS[method], size=jnp.array([0, 4], jnp.int32))
    assert not np.any(found.root[0])
    assert found.residual[0] == 0
    expected = (1 + 1e-5) ** (-1 / 4) * np.eye(4)[None]
    assert relative(found.root[1:], expected).max() <= attainable(1, 4, method, 4)


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("method", METHODS)
def test_toeplitz(method, n):
    """X A X = I and inv(X)^2 = A: twice the error of X, times the condition number."""
    a = tridiagonal(n, [(2.0, 0.25)]) * np.array([1, 2, 3])[:, None, None]
    x = np.asarray(roots_of(single(a), -1 / 2, METHODS[method], ridge=0.0).root, np.float64)
    condition = 2.5 / 1.5
    bound = 2 * condition * attainable(condition, 2, method, n)
    assert relative(x @ a @ x, np.broadcast_to(np.eye(n), a.shape)).max() <= bound
    inverse = np.linalg.inv(x)
    assert relative(inverse @ inverse, a).max() <= bound


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8, 1e-12, 1e12])
@pytest.mark.parametrize("n", [4, 32, 128])
def test_largest_eigenvalue(n, scale):
    """The estimate is the Rayleigh quotient after 24 power iterations: c' A^49 c / c' A^48 c.

    It is too low by a few percent at most. In float32 each of 25 products is off by n roundings, and a
    quotient by twice that.
    """
    spectra = [np.linspace(0.1, 1, n), np.geomspace(1e-8, 1, n), np.r_[1, np.full(n - 1, 0.9)]]
    a = np.concatenate([spd(values, seed) for seed, values in enumerate(spectra)])
    gram = np.random.default_rng(7).normal(size=(n, n))
    a = scale * np.concatenate([a, (gram @ gram.T)[None], np.diag(spectra[0])[None]])
    values, vectors = np.linalg.eigh(a)
    largest = values[:, -1]
    start = jax.random.uniform(jax.random.PRNGKey(0), (n,), minval=-1.0, maxval=1.0)
    weights = (np.asarray(start, np.float64) @ vectors) ** 2 * (values / largest[:, None]) ** 48
    expected = np.sum(weights * values, axis=1) / np.sum(weights, axis=1)
    found = np.asarray(jax.jit(largest_eigenvalue)(single(a)))
    np.testing.assert_allclose(found, expected, rtol=2 * 25 * n * UNIT)
    assert np.all(expected >= 0.95 * largest)
    assert np.all(found <= largest * (1 + 4 * n * UNIT))  # two sums of n terms


def test_largest_eigenvalue_of_zero():
    assert not np.any(jax.jit(largest_eigenvalue)(np.zeros((2, 4, 4), np.float32)))


@pytest.mark.parametrize("method", ALL)
def test_zero_matrix(method):
    """It has no root and its neighbour is unaffected; an absolute ridge gives a scaled identity."""
    a = np.array([np.zeros((3, 3)), np.diag([1, 2, 4])])
    found = roots_of(single(a), -1 / 4, ALL[method])
    ridge = 0.0 if method == "pseudo" else 4e-5
    if method == "pseudo":
        assert not np.any(found.root[0])
    else:
        assert found.residual[0] == jnp.inf
        lifted = roots_of(single(a), -1 / 4, ALL[method], absolute_ridge=1e-4)
        bound = attainable(1, 4, method, 3)
        assert relative(lifted.root[:1], 10 * np.eye(3)[None]).max() <= bound
        assert lifted.residual[0] <= certified(1, 4, method, 3)
    # The relative ridge uses an estimate that may be off by a few percent.
    bound = attainable(4, 4, method, 3) + 0.05 * ridge / 4
    assert relative(found.root[1:], exact(a[1:] + ridge * np.eye(3), -1 / 4)).max() <= bound


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_rank_one_matrix(method, p):
    """With the ridge that the documentation recommends, its root passes the certificate."""
    vector = np.random.default_rng(0).normal(size=(16, 1))
    relative_ridge = 1e-4 if method == "schulz" else 1e-5
    a = single((vector @ vector.T)[None])
    found = roots_of(a, -1 / p, METHODS[method], ridge=relative_ridge)
    assert np.all(np.isfinite(found.root))
    assert found.residual[0] <= 0.1
    ridge = relative_ridge * float((vector**2).sum())
    expected = exact(vector @ vector.T + ridge * np.eye(16)[None], -1 / p)
    assert relative(found.root, expected).max() <= attainable(1 / relative_ridge, p, method, 16)


@pytest.mark.parametrize("exponent", [-2 / 3, -1 / 3, -1 / 8, -3 / 4, -1, -2])
@pytest.mark.parametrize("method", EXACT)
def test_fractional_exponents(method, exponent):
    a = spd(np.geomspace(1e-2, 3, 12))
    found = roots_of(single(a), exponent, EXACT[method], ridge=0.0)
    bound = -exponent * attainable(300, 1, method, 12)
    assert relative(found.root, exact(a, exponent)).max() <= bound


@pytest.mark.parametrize(
    ("method", "exponent"),
    [
        (method, exponent)
        for method in METHODS
        for exponent in (-1 / 2, -1 / 4, -3 / 4, -2 / 3)
        if method != "schulz" or exponent != -2 / 3
    ],
)
def test_scale_passes_through(method, exponent):
    """The root of cA is c^(-q/p) times that of A, for c from 1e-12 to 1e12."""
    a = spd(np.geomspace(1e-4, 1, 8))
    scales = 10.0 ** np.arange(-12, 13, 3)
    found = roots_of(single(a * scales[:, None, None]), exponent, METHODS[method])
    reference = roots_of(single(a), exponent, METHODS[method])
    expected = np.asarray(reference.root, np.float64) * (scales**exponent)[:, None, None]
    # Both roots have errors.
    assert relative(found.root, expected).max() <= -2 * exponent * attainable(1e4, 1, method, 8)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 2.0**20, 2.0**40])
@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_make_no_difference(method, scale):
    """The certificate is bitwise the same, and the root is only rescaled."""
    a = single(spd(np.geomspace(1e-4, 1, 8)))
    found, reference = (roots_of(x, -1 / 4, METHODS[method]) for x in (scale * a, a))
    np.testing.assert_allclose(found.root, reference.root * scale**-0.25, rtol=8 * UNIT)
    np.testing.assert_array_equal(found.residual, reference.residual)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_matrices_have_float32_roots(dtype):
    a = single(spd([1, 2, 3, 4])).astype(dtype)
    found = inverse_root(a, -1 / 2, ridge=0.0)
    assert found.root.dtype == jnp.float32
    assert relative(found.root, exact(a.astype(jnp.float32), -1 / 2)).max() <= attainable(4, 2)


@pytest.mark.parametrize("method", METHODS)
def test_one_by_one_and_no_matrices(method):
    found = roots_of(single([[[16.0]], [[81.0]]]), -1 / 4, METHODS[method], ridge=0.0)
    bound = attainable(1, 4, method, 1)
    np.testing.assert_allclose(found.root.ravel(), [1 / 2, 1 / 3], rtol=bound)
    assert roots_of(jnp.zeros((0, 3, 3)), -1 / 4, METHODS[method]).root.shape == (0, 3, 3)


def test_cubic_steps_bring_the_interval_to_one():
    x = np.geomspace(1e-3, 1, 10001)
    for beta, alpha in cubic_steps(1e-3, 10):
        x = beta * x + alpha * x**3
    assert np.abs(x - 1).max() <= 1e-3


def test_cubic_step_is_the_best_one():
    """In one step, the errors at both ends are equal, and as large with the other sign in between."""
    (beta, alpha) = cubic_steps(0.1, 1)[0]
    x = np.linspace(0.1, 1, 10001)
    error = beta * x + alpha * x**3 - 1
    assert error[0] == pytest.approx(error[-1], rel=HALF)
    assert error[0] == pytest.approx(error.min(), rel=HALF)
    # The maximum is at most half an interval from a grid point; the cubic's curvature is 6 alpha x.
    missed = 3 * abs(alpha) * (0.9 / 20000) ** 2
    assert error.max() == pytest.approx(-error[0], abs=missed)
