"""How much a program calculates, counted in what was traced of it.

The compiler counts what is in a loop once, however often it runs, and nothing of what it hands to a
library. Here loops count as often as they run, where that is known while tracing. Elementary operations
on floats count one for each element of their result, sums one for each element that is added up.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend import core

# Times n**3, for matrices [n, n]; Golub and Van Loan, 4th edition, sections 4.2, 5.1.6, 5.2.2, 8.3.3.
_DECOMPOSITIONS = {
    "eigh": 9,
    "geqrf": 4 / 3,
    "householder_product": 4 / 3,
    "qr": 8 / 3,
    "cholesky": 1 / 3,
    "triangular_solve": 1,
}
_MOVES = re.compile(
    "axis_index|barrier|broadcast|concat|constraint|convert|copy|device_put|gather|iota|pad|pcast|permute"
    "|pvary|reshape|reshard|rev|scatter|select|slice|split|squeeze|to_all|transpose"
)
_SUMS = re.compile("reduce_(?!precision)|arg|cum|psum|pmax")


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations of one device."""

    always: float = 0.0
    """In every step."""
    sometimes: float = 0.0
    """More, in a step in which every loop runs once of which it is not known how often it runs; as that
    in which roots are refreshed."""

    def __add__(self, other: "Arithmetic") -> "Arithmetic":
        return Arithmetic(self.always + other.always, self.sometimes + other.sometimes)

    def times(self, count: float) -> "Arithmetic":
        """Of so many times the same."""
        return Arithmetic(self.always * count, self.sometimes * count)


def arithmetic(traced: Any, devices: int) -> Arithmetic:
    """What one of some devices calculates.

    Args:
      traced: ``jax.jit(function).trace(...)``.
      devices: that share evenly what is not in a `jax.shard_map`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.arithmetic import arithmetic
      >>> product = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: x @ y, x)
      >>> arithmetic(jax.jit(product).trace(jnp.ones((10, 10))), devices=1).always
      10000.0
    """
    return _of(traced.jaxpr.jaxpr, 1 / devices)


def _of(jaxpr: Any, share: float) -> Arithmetic:
    total = Arithmetic()
    for equation in jaxpr.eqns:
        total += _of_one(equation, share)
    return total


def _of_one(equation: Any, share: float) -> Arithmetic:
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        return _of(parameters["jaxpr"].jaxpr, share).times(parameters["length"])
    if name == "while":
        body = _of(parameters["body_jaxpr"].jaxpr, share)
        return Arithmetic(0.0, body.always + body.sometimes)
    if name == "cond":
        branches = (_of(branch.jaxpr, share) for branch in parameters["branches"])
        return max(branches, key=lambda found: found.always + found.sometimes)
    if name == "shard_map":
        # What is inside is of one device along these axes, whose name differs between versions of JAX.
        here = parameters.get("newly_manual_axes", parameters.get("manual_axes"))
        sizes = (parameters["mesh"].shape[axis] for axis in here)
        return _of(parameters["jaxpr"], share * math.prod(sizes))
    inner = list(_jaxprs(parameters))
    if inner:
        return sum((_of(jaxpr, share) for jaxpr in inner), Arithmetic())
    return Arithmetic(share * _operations(name, equation))


def _jaxprs(parameters: Any) -> Iterator[Any]:
    for value in parameters.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _operations(name: str, equation: Any) -> float:
    floats = [x.aval for x in equation.outvars if jnp.issubdtype(x.aval.dtype, jnp.inexact)]
    if _MOVES.search(name) or not floats:
        return 0.0
    result, shapes = floats[0], [x.aval.shape for x in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * math.prod(result.shape) * math.prod(shapes[0][axis] for axis in contracted)
    if name in _DECOMPOSITIONS:
        return _DECOMPOSITIONS[name] * math.prod(shapes[0]) * shapes[0][-1]
    return float(math.prod(shapes[0] if _SUMS.match(name) else result.shape))
