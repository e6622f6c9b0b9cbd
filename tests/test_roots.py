"""Inverse roots and their certificate; packed symmetric matrices; when what is refreshed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ravine.optimizers.matrix.algebra.root_parts import largest_eigenvalue
from ravine.optimizers.matrix.algebra.roots import (
    CoupledNewton,
    CoupledNewtonSchulz,
    Eigh,
    Found,
    PseudoInverse,
    exponent_fraction,
    inverse_root,
)
from ravine.optimizers.matrix.algebra.roots_by_products import MARGIN, cubic_steps

from .arrays import single
from .tolerances import HALF, UNIT

METHODS = {"eigh": Eigh(), "newton": CoupledNewton(), "schulz": CoupledNewtonSchulz()}
ALL = {**METHODS, "pseudo": PseudoInverse()}
EXACT = {"eigh": Eigh(), "newton": CoupledNewton(), "pseudo": PseudoInverse()}
# The roots each method offers of those that the references test.
OFFERED = [
    (method, p) for method in METHODS for p in (1, 2, 4, 8) if method != "schulz" or p in (2, 4)
]
TEN = tuple(10.0**power for power in range(-3, 3))

roots_of = jax.jit(inverse_root, static_argnames=("exponent", "method", "ridge", "absolute_ridge"))


def spd(values, seed=0):
    """`[1, n, n]` with these eigenvalues, in float64."""
    n = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return ((basis * np.asarray(values)) @ basis.T)[None]


@functools.cache
def _decomposed(contents, shape):
    return np.linalg.eigh(np.frombuffer(contents).reshape(shape))


def exact(matrices, exponent):
    """Their powers, in float64."""
    matrices = np.asarray(matrices, np.float64)
    values, vectors = _decomposed(matrices.tobytes(), matrices.shape)
    return (vectors * values[:, None, :] ** exponent) @ np.swapaxes(vectors, 1, 2)


def relative(found, expected):
    """The largest difference of each matrix, relative to its largest element."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max((1, 2)) / np.abs(expected).max((1, 2))


def attainable(condition, p, method="eigh", n=1):
    """How near a root of exponent -1/p comes to the true one in float32, relative to it.

    A rounding unit of the largest eigenvalue is `condition` units of the smallest, which A^(-1/p) passes
    on divided by p. Four such: one for A, which float32 does not hold exactly, the others for the
    decomposition or the products that the method consists of (measured on three instruction sets:
    0.1 to 1.3 of one). Two products of n terms, or eigenvectors orthogonal to n units, come to it
    whatever the condition, and where the method would stop without rounding.
    """
    return (4 * condition / p + 2 * n) * UNIT + unfinished(method, condition, p, n)


def unfinished(method, condition, p, n):
    """How far from the root a method may stop, in exact arithmetic, relative to the root."""
    if method == "newton":
        # No element of X^p A - I is above the tolerance; as a norm, n of it, and of X a p-th of that.
        return n * CoupledNewton().tolerance / p
    if method == "schulz":
        # The iteration acts on each eigenvalue by itself; its second pair starts from the first one's.
        chosen, worst = CoupledNewtonSchulz(), 0.0
        for stage in (1, 2)[: p // 2]:
            x = np.geomspace(1 / (MARGIN * condition), 1, 1000) ** (1 / (2 * stage))
            lower = math.sqrt(chosen.lower ** (1 / stage) / MARGIN)
            for beta, alpha in cubic_steps(lower, chosen.steps):
                x = beta * x + alpha * x**3
            worst += np.abs(x - 1).max()
        return worst
    return 0.0


def certified(condition, p, method="eigh", n=1):
    """What the certificate of such a root may show, where an error of the smallest counts p-fold."""
    return p * condition ** (1 / p) * attainable(condition, p, method, n)


def tridiagonal(n, pairs):
    off = np.eye(n, k=1) + np.eye(n, k=-1)
    return np.stack([alpha * np.eye(n) + beta * off for alpha, beta in pairs])


@pytest.mark.parametrize("method", [*METHODS.values(), PseudoInverse()], ids=repr)
def test_metas_badly_conditioned_matrix(method):
    """Meta's own example and bounds: condition number 7e5."""
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
    # 24 power iterations leave a quarter, to the 48th power, of the smaller eigenvalue.
    assert found.condition[0] == pytest.approx(4, rel=2 * certified(4, 2, method, 2))


@pytest.mark.parametrize(("method", "p"), OFFERED)
@pytest.mark.parametrize("n", [10, 100])
def test_tridiagonal_grid(method, n, p):
    pairs = [(alpha, beta) for alpha in TEN for beta in (0.0, *TEN) if 2 * beta <= alpha]
    matrices = tridiagonal(n, pairs)
    root = roots_of(single(matrices), -1 / p, METHODS[method], ridge=0.0).root
    # alpha -+ 2 beta bound the eigenvalues, and beta is a tenth of alpha or less.
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
    assert found.condition[0] == pytest.approx(4)


def test_pseudo_inverse_of_a_rotated_singular_matrix():
    values = np.array([3.0, 2.0, 1.0, 0.5, 0, 0, 0, 0])
    power = np.where(values > 0, np.maximum(values, 0.1) ** -0.25, 0)
    found = roots_of(single(spd(values)), -1 / 4, PseudoInverse(rtol=1e-4))
    # Rounding also turns the null space towards the smallest eigenvalue kept, by 6 units, whatever p.
    assert relative(found.root, spd(power)).max() <= attainable(6, 1)
    assert found.residual[0] <= 4 * 6 ** (1 / 4) * attainable(6, 1)


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

    CoupledNewtonSchulz is left out: at 1e6 its ten steps give .36 and it says so.
    """
    a = single(spd(condition ** (-np.arange(16) / 15)))
    assert roots_of(a, -1 / 4, EXACT[method], ridge=1e-12).residual[0] < 0.1


def test_newton_schulz_below_its_range():
    a = single(spd(1e5 ** (-np.arange(16) / 15)))
    assert roots_of(a, -1 / 4, CoupledNewtonSchulz(), ridge=1e-12).residual[0] < 0.1


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(
    "method", [Eigh(), CoupledNewton(tolerance=1e-12), CoupledNewtonSchulz()], ids=repr
)
@pytest.mark.parametrize("size", [4, 32])
def test_padding_makes_no_difference(size, method, p):
    """Nor to the estimate of the largest eigenvalue, and so to the ridge."""
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
    """X A X = I, and the square of the inverse of X is A: twice the error of X, and its condition's."""
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
    spectra = [np.linspace(0.1, 1, n), np.geomspace(1e-8, 1, n), np.r_[1, np.full(n - 1, 0.9)]]
    a = np.concatenate([spd(values, seed) for seed, values in enumerate(spectra)])
    gram = np.random.default_rng(7).normal(size=(n, n))
    a = scale * np.concatenate([a, (gram @ gram.T)[None], np.diag(spectra[0])[None]])
    largest = np.linalg.eigvalsh(a)[:, -1]
    found = np.asarray(jax.jit(largest_eigenvalue)(single(a)))
    np.testing.assert_allclose(found, largest, rtol=0.05)
    assert np.all(found <= largest * (1 + 4 * n * UNIT))  # two sums of n terms


def test_largest_eigenvalue_of_zero():
    assert not np.any(jax.jit(largest_eigenvalue)(np.zeros((2, 4, 4), np.float32)))


@pytest.mark.parametrize("method", ALL)
def test_zero_matrix(method):
    """No root, and no harm to the neighbour; with an absolute ridge, a multiple of the identity."""
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
    # The ridge follows an estimate that is a few percent off, if it is one.
    bound = attainable(4, 4, method, 3) + 0.05 * ridge / 4
    assert relative(found.root[1:], exact(a[1:] + ridge * np.eye(3), -1 / 4)).max() <= bound


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_rank_one_matrix(method, p):
    """With the ridge that the documentation names its root passes the certificate."""
    vector = np.random.default_rng(0).normal(size=(16, 1))
    relative_ridge = 1e-4 if method == "schulz" else 1e-5
    a = single((vector @ vector.T)[None])
    found = roots_of(a, -1 / p, METHODS[method], ridge=relative_ridge)
    assert np.all(np.isfinite(found.root))
    assert found.residual[0] <= 0.1
    ridge = relative_ridge * float((vector**2).sum())
    expected = exact(vector @ vector.T + ridge * np.eye(16)[None], -1 / p)
    assert relative(found.root, expected).max() <= attainable(1 / relative_ridge, p, method, 16)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("n", [16, 128])
def test_what_float32_cannot_do_is_refused(n, method, p):
    """A condition number of 1e8, ridge 1e-10: the certificate is the true residual."""
    a = single(spd(np.geomspace(1e-8, 1, n)))
    assert roots_of(a, -1 / p, METHODS[method], ridge=1e-10).residual[0] > 0.05


@pytest.mark.parametrize("exponent", [-2 / 3, -1 / 3, -1 / 8, -3 / 4, -1, -2])
@pytest.mark.parametrize("method", EXACT)
def test_fractional_exponents(method, exponent):
    a = spd(np.geomspace(1e-2, 3, 12))
    found = roots_of(single(a), exponent, EXACT[method], ridge=0.0)
    bound = -exponent * attainable(300, 1, method, 12)
    assert relative(found.root, exact(a, exponent)).max() <= bound


@pytest.mark.parametrize("condition", [300, 1e4])
@pytest.mark.parametrize("exponent", [-1 / 2, -1, -2 / 3, -3 / 4])
@pytest.mark.parametrize("method", EXACT)
def test_certificate_accepts_good_roots(method, exponent, condition):
    """A root as good as float32 has it is not refused at Shampoo's default tolerance."""
    a = spd(np.geomspace(1 / condition, 1, 12))
    found = roots_of(single(a), exponent, EXACT[method], ridge=0.0)
    bound = -exponent * attainable(condition, 1, method, 12)
    assert relative(found.root, exact(a, exponent)).max() <= bound
    assert found.residual[0] <= 0.1


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
    """The root of cA is c^(-q/p) that of A, from 1e-12 to 1e12."""
    a = spd(np.geomspace(1e-4, 1, 8))
    scales = 10.0 ** np.arange(-12, 13, 3)
    found = roots_of(single(a * scales[:, None, None]), exponent, METHODS[method])
    reference = roots_of(single(a), exponent, METHODS[method])
    expected = np.asarray(reference.root, np.float64) * (scales**exponent)[:, None, None]
    # Both are off.
    assert relative(found.root, expected).max() <= -2 * exponent * attainable(1e4, 1, method, 8)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 2.0**20, 2.0**40])
@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_make_no_difference(method, scale):
    """The certificate is bitwise the same, and the root is only rescaled."""
    a = single(spd(np.geomspace(1e-4, 1, 8)))
    found, reference = (roots_of(x, -1 / 4, METHODS[method]) for x in (scale * a, a))
    np.testing.assert_allclose(found.root, reference.root * scale**-0.25, rtol=8 * UNIT)
    np.testing.assert_array_equal(found.residual, reference.residual)


def off_by(factor):
    def method(matrices, p, ridge, absolute):
        found = Eigh()(matrices, p, ridge, absolute)
        return Found(found.root * factor, *found[1:])

    return method


def test_certificate_sees_a_wrong_root():
    a = single(spd([1, 2, 3, 4]))
    assert inverse_root(a, -1 / 4, off_by(1.0)).residual[0] <= 1e-4
    # X^4 is off by 1.05^4 - 1.
    assert inverse_root(a, -1 / 4, off_by(1.05)).residual[0] == pytest.approx(0.2155, abs=2e-3)
    assert inverse_root(a, -2 / 3, off_by(1.05)).residual[0] == pytest.approx(0.1576, abs=2e-3)
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


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(-0.25, (1, 4)), (-2 / 3, (2, 3)), (-1, (1, 1)), (-0.375, (3, 8)), (-2, (2, 1))],
)
def test_exponent_is_a_fraction(ratio, expected):
    assert exponent_fraction(ratio) == expected


@pytest.mark.parametrize("exponent", [0.0, 0.25, 1, math.inf, -math.inf, math.nan])
def test_exponent_that_is_not_negative(exponent):
    with pytest.raises(ValueError, match="exponent must be negative"):
        inverse_root(jnp.eye(2)[None], exponent)


@pytest.mark.parametrize("exponent", [-math.sqrt(0.5), -math.pi / 10, -1e-3])
def test_irrational_exponent(exponent):
    with pytest.raises(ValueError, match="denominator up to 64"):
        inverse_root(jnp.eye(2)[None], exponent)


@pytest.mark.parametrize("exponent", [-1 / 3, -1, -1 / 8, -2 / 3])
def test_newton_schulz_names_what_it_can_do(exponent):
    with pytest.raises(ValueError, match=r"-1/2 and -1/4, not .*; use Eigh"):
        inverse_root(jnp.eye(2)[None], exponent, CoupledNewtonSchulz())


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (lambda: PseudoInverse(rtol=1.0), r"rtol must lie in \[0, 1\), got 1"),
        (lambda: PseudoInverse(rtol=-1e-3), r"rtol must lie in \[0, 1\), got -"),
        (lambda: CoupledNewton(tolerance=-1.0), r"out of range in .*\(tolerance=-1"),
        (lambda: CoupledNewton(max_iterations=0), "out of range in .*max_iterations=0,"),
        (lambda: CoupledNewton(error_ratio=0.5), r"out of range in .*error_ratio=0\.5"),
        (lambda: CoupledNewtonSchulz(steps=0), r"steps must be at least 1 .*steps=0"),
        (lambda: CoupledNewtonSchulz(lower=0.0), r"lower in \(0, 1\), got .*lower=0\.0"),
        (lambda: CoupledNewtonSchulz(lower=1.0), r"lower in \(0, 1\), got .*lower=1\.0"),
    ],
)
def test_bad_method(build, culprit):
    with pytest.raises(ValueError, match=culprit):
        build()


def test_cubic_steps_bring_the_interval_to_one():
    x = np.geomspace(1e-3, 1, 10001)
    for beta, alpha in cubic_steps(1e-3, 10):
        x = beta * x + alpha * x**3
    assert np.abs(x - 1).max() <= 1e-3


def test_cubic_step_is_the_best_one():
    """One step: equal errors at both ends and, the other way, between."""
    (beta, alpha) = cubic_steps(0.1, 1)[0]
    x = np.linspace(0.1, 1, 10001)
    error = beta * x + alpha * x**3 - 1
    assert error[0] == pytest.approx(error[-1])
    assert error[0] == pytest.approx(error.min())
    assert error.max() == pytest.approx(-error[0], rel=1e-6)
