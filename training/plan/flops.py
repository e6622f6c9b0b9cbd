"""How much a program calculates, counted in what was traced of it.

The compiler counts what is in a loop once, however often it runs, and nothing of what it hands to a
library. Here loops count as often as they run, where that is known while tracing. Elementary
operations on floats count one for each element of their result, sums one for each element that is
added up. Unknown operations are listed, never counted as zero.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

# Times n**3, for matrices [n, n]; Golub and Van Loan, 4th edition, chapters 3, 4, 5 and 8.
_DECOMPOSITIONS = {
    "eigh": 9,
    "geqrf": 4 / 3,
    "householder_product": 4 / 3,
    "qr": 8 / 3,
    "cholesky": 1 / 3,
    "lu": 2 / 3,
}
_MOVES = re.compile(
    "axis_index|barrier|broadcast|concat|constraint|convert|copy|device_put|empty|gather|iota|pad|pcast"
    "|permute|pvary|random|real|imag|reshape|reshard|rev|scatter|select|slice|sort|split|squeeze|stack"
    "|stop_gradient|to_all|top_k|transpose|while"
)
_SUMS = re.compile("reduce_(?!precision)|arg|cum|psum|pmax|pmin")
_ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "cos",
        "cosh",
        "digamma",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "integer_pow",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "nextafter",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
    ]
)


class Product(NamedTuple):
    """A product of matrices, or a decomposition: what is slower than reading and writing it
    once."""

    kind: str
    """As the keys of `ravine.training.plan.chips.Chip.products`, or "decomposition"."""
    operations: float
    moved: float
    """Bytes of operands and results."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Operations of one device."""

    always: float = 0.0
    """In every step."""
    sometimes: float = 0.0
    """More, in a step that takes the longest branch everywhere and runs every loop of unknown
    length once; as that in which roots are refreshed."""
    uncounted: frozenset[str] = frozenset()
    """Primitives on floats whose operations are unknown."""
    products: Mapping[Product, float] = dataclasses.field(default_factory=dict)
    """How often each runs in every step."""
    more_products: Mapping[Product, float] = dataclasses.field(default_factory=dict)
    """How often each runs more at times."""

    def __add__(self, other: "Arithmetic") -> "Arithmetic":
        return Arithmetic(
            self.always + other.always,
            self.sometimes + other.sometimes,
            self.uncounted | other.uncounted,
            _sum(self.products, other.products),
            _sum(self.more_products, other.more_products),
        )

    def times(self, count: float) -> "Arithmetic":
        """The cost of several repetitions."""
        return Arithmetic(
            self.always * count,
            self.sometimes * count,
            self.uncounted,
            {product: n * count for product, n in self.products.items()},
            {product: n * count for product, n in self.more_products.items()},
        )

    @property
    def all_products(self) -> Mapping[Product, float]:
        """How often each runs in a step that takes the longest branches."""
        return _sum(self.products, self.more_products)


def _sum(ours: Mapping[Product, float], theirs: Mapping[Product, float]) -> Mapping[Product, float]:
    found = Counter(ours)
    found.update(theirs)
    return found


def arithmetic(traced: Any, devices: int) -> Arithmetic:
    """The share of one device among several.

    Args:
      traced: ``jax.jit(function).trace(...)``.
      devices: that share evenly what is not in a `jax.shard_map`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ravine.training.plan.flops import arithmetic
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
        return Arithmetic(
            0.0, body.always + body.sometimes, body.uncounted, more_products=body.all_products
        )
    if name == "cond":
        branches = [_of(branch.jaxpr, share) for branch in parameters["branches"]]
        least = min(branches, key=lambda found: found.always)
        most = max(branches, key=lambda found: found.always + found.sometimes)
        return Arithmetic(
            least.always,
            most.always + most.sometimes - least.always,
            frozenset().union(*(b.uncounted for b in branches)),
            least.products,
            Counter(most.all_products) - Counter(least.products),
        )
    if name == "shard_map":
        # What is inside is of one device along these axes, whose name differs between versions of
        # JAX.
        here = parameters.get("newly_manual_axes", parameters.get("manual_axes"))
        sizes = (parameters["mesh"].shape[axis] for axis in here)
        return _of(parameters["jaxpr"], share * math.prod(sizes))
    inner = list(_jaxprs(parameters))
    if inner:
        return sum((_of(jaxpr, share) for jaxpr in inner), Arithmetic())
    operations = _operations(name, equation)
    if operations is None:
        return Arithmetic(uncounted=frozenset({name}))
    kind = _kind(name, equation)
    if not kind or not operations:
        return Arithmetic(share * operations)
    moved = sum(_bytes(x.aval) for x in (*equation.invars, *equation.outvars))
    product = Product(kind, share * operations, share * moved)
    return Arithmetic(share * operations, products={product: 1.0})


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _kind(name: str, equation: Any) -> str:
    """Of a product or decomposition; nothing for others."""
    if name in (*_DECOMPOSITIONS, "svd", "triangular_solve"):
        return "decomposition"
    if name != "conv_general_dilated" and not name.startswith(("dot_general", "ragged_dot")):
        return ""
    dtypes = {x.aval.dtype for x in equation.invars[:2]}
    if all(dtype.itemsize < 4 for dtype in dtypes):
        return "bfloat16"
    precision = equation.params.get("precision")
    precision = precision[0] if isinstance(precision, tuple) else precision
    if precision == jax.lax.Precision.HIGH:
        return "float32:high"
    return "float32:highest" if precision == jax.lax.Precision.HIGHEST else "float32"


def _jaxprs(parameters: Any) -> Iterator[Any]:
    for value in parameters.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _operations(name: str, equation: Any) -> float | None:
    """Of one equation; None where that is not known."""
    floats = [x.aval for x in equation.outvars if jnp.issubdtype(x.aval.dtype, jnp.inexact)]
    if not floats:
        return 0.0
    result, shapes = floats[0], [x.aval.shape for x in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * math.prod(result.shape) * math.prod(shapes[0][axis] for axis in contracted)
    if name.startswith("ragged_dot"):
        # Every row meets the matrix of its own group: [m, k] and [groups, k, n].
        return 2.0 * math.prod(shapes[0]) * shapes[1][-1]
    if name == "conv_general_dilated":
        outputs = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(result.shape) * math.prod(shapes[1]) / outputs
    if name == "triangular_solve":
        return float(math.prod(shapes[1]) * shapes[0][-1])
    if name == "svd":
        return _svd(shapes[0], vectors=equation.params["compute_uv"])
    if name in _DECOMPOSITIONS:
        return _DECOMPOSITIONS[name] * math.prod(shapes[0]) * shapes[0][-1]
    if _SUMS.match(name):
        return float(math.prod(shapes[0]))
    if name in _ELEMENTWISE:
        return float(math.prod(result.shape))
    return 0.0 if _MOVES.search(name) else None


def _svd(shape: tuple[int, ...], *, vectors: bool) -> float:
    """Golub and Van Loan, 4th edition, figure 8.6.1."""
    *batch, m, n = shape
    m, n = max(m, n), min(m, n)
    each = 4 * m**2 * n + 8 * m * n**2 + 9 * n**3 if vectors else 4 * m * n**2 - 4 / 3 * n**3
    return math.prod(batch) * each
