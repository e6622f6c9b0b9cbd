"""Bad options of Shampoo are refused, and the error names them."""

import math

import jax.numpy as jnp
import pytest
import ravine
from ravine.optimizers.matrix.algebra.roots import CoupledNewtonSchulz

BAD = [
    ({"blocks": {"size": 0}}, r"blocks\.size must be a whole number of at least 1, got 0"),
    ({"blocks": {"size": 2.5}}, r"blocks\.size must be a whole number or None, got 2\.5"),
    ({"refresh": {"every": 0}}, r"refresh\.every must be a whole number of at least 1"),
    ({"refresh": {"every": 1.5}}, r"refresh\.every must be a whole number, got 1\.5"),
    ({"roots": {"exponent": 0.25}}, r"exponent must be negative.*None takes -1/\(2 k\)"),
    ({"roots": {"exponent": 0.0}}, r"exponent must be negative, as -0\.25, got 0\.0"),
    ({"refresh": {"every": 10, "start": 9}}, r"refresh\.start must be a step from 10 .*, got 9"),
    ({"refresh": {"start": 12.5}}, r"refresh\.start must be a step from 10 .*, got 12\.5"),
    (
        {"graft": {"step": "adamax"}},
        r"graft\.step must be one of .*, got 'adamax'; did you mean adam",
    ),
    (
        {"b2": 1.0, "graft": {"step": "adam"}},
        r"graft 'adam' .*: graft\.b2 must lie .*give graft\.b2",
    ),
    ({"b2": 1.0, "graft": {"step": "rmsprop"}}, r"graft 'rmsprop' .*: graft\.b2 must lie"),
    ({"graft": {"b2": 1.5}}, r"graft\.b2 must lie in \[0, 1\), got 1\.5"),
    ({"graft": {"step": "sgd", "b2": 5.0}}, r"graft\.b2 must lie in \[0, 1\), got 5\.0"),
    ({"eps": -1.0, "graft": {"step": "none"}}, "eps must be finite and not negative"),
    ({"graft": "sgd"}, r"give ravine\.Grafting\(step='sgd'\)"),
    ({"graft": "adamax"}, r"graft must be ravine\.Grafting\(\.\.\.\), got 'adamax'\."),
    ({"graft": None}, r"got None; leave it out, or give ravine\.Grafting\(step='none'\)\."),
    ({"roots": None}, r"roots must be ravine\.Roots\(\.\.\.\), got None; leave it out\."),
    ({"refresh": 20}, r"give ravine\.Refresh\(every=20\)"),
    ({"factors": {"max_elements": 0}}, r"factors\.max_elements must be a whole number of at"),
    ({"eps": -1.0}, "eps must be finite and not negative"),
    ({"graft": {"per": "row"}}, r"graft\.per must be one of 'block', 'parameter'"),
    ({"blocks": {"sides": "left"}}, r"blocks\.sides must be one of 'both', .*, got 'left'"),
    ({"factors": {"statistics": "hessian"}}, r"factors\.statistics must be one of 'gram', 'kl'"),
    ({"blocks": {"bound": 0}}, r"blocks\.bound must be a whole number of at least 1"),
    ({"roots": {"patience": -1}}, r"roots\.patience must be a whole number of at least 0"),
    ({"roots": {"patience": 1.5}}, r"roots\.patience must be a whole number, got 1\.5"),
    ({"b1": 1.0}, r"^b1 must lie in \[0, 1\), got 1\.0"),
    ({"b2": 1.1}, r"^b2 must lie in \[0, 1\), got 1\.1"),
    ({"roots": {"ridge": -1e-5}}, r"roots\.ridge must be finite and not negative"),
    ({"roots": {"absolute_ridge": math.nan}}, r"roots\.absolute_ridge must be a finite number"),
    ({"roots": {"tolerance": -0.1}}, r"roots\.tolerance must be finite and not negative"),
]


@pytest.mark.parametrize(("options", "complaint"), BAD, ids=str)
@pytest.mark.parametrize("build", [ravine.scale_by_shampoo, ravine.shampoo])
def test_bad_option(build, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(**options)


def test_roots_that_a_method_does_not_find_are_refused_at_init():
    tx = ravine.scale_by_shampoo(roots=ravine.Roots(method=CoupledNewtonSchulz()))
    tx.init({"matrix": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"parameter cube has 3 axes .* -1/6; use Eigh"):
        tx.init({"cube": jnp.ones((2, 3, 4))})
    halves = ravine.Roots(method=CoupledNewtonSchulz(), exponent=-0.5)
    ravine.scale_by_shampoo(roots=halves).init(jnp.ones((2, 3, 4)))
