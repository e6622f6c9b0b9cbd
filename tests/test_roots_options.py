"""Inverse roots: exponents and options that are refused."""

import math

import jax.numpy as jnp
import pytest
from ravine.optimizers.matrix.algebra.roots import (
    CoupledNewton,
    CoupledNewtonSchulz,
    PseudoInverse,
    exponent_fraction,
    inverse_root,
)


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
    ("build", "complaint"),
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
def test_bad_method(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()
