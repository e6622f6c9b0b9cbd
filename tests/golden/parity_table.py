"""Ravine's first-order optimizers against the official ones: cases, measurement and table.

`python tests/golden/parity_table.py` measures every case and rewrites `docs/parity.md`. The tests
measure again and check the result against the tolerances and against the committed table.
"""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ravine
from ravine.optimizers.matrix.shape.layout import MatrixAxes

GOLDEN = json.loads(Path(__file__).with_name("first_order.json").read_text())
TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
TOLERANCES = {"float64": 1e-6, "float32": 1e-5}
STEPS = len(GOLDEN["learning_rate_factors"])
# Classes in which torch adds `weight_decay` to the gradient.
_ADDED_TO_THE_GRADIENT = {"SGD", "Adagrad", "RMSprop", "Adam", "SGDScheduleFreeReference"}
_BUILDERS = {
    "SophiaG": ravine.sophia_g,
    "AdamWScheduleFreeReference": ravine.schedule_free_adamw,
    "SGDScheduleFreeReference": ravine.schedule_free_sgd,
    "C-AdamW": ravine.cautious_adamw,
    "C-Lion": ravine.cautious_lion,
}
_RENAMED = {
    "beta3_warmup": "b3_warmup",
    "r": "weight_power",
    "foreach": None,
    "lr_1d": None,
    "weight_decay_1d": None,
}


def ours(case: dict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Ravine's optimizer for a golden case, given the arguments of the source."""
    arguments = dict(case["arguments"])
    name = case["class"]
    builder = _BUILDERS.get(name) or getattr(ravine, name.lower())
    if name in _ADDED_TO_THE_GRADIENT:
        arguments["weight_decay_form"] = "l2"
    if name == "Adam":
        builder = ravine.adamw
        arguments.setdefault("weight_decay", 0.0)
    if name == "MARS":
        # The official file applies to leaves with two axes, or to everything.
        everything = arguments.pop("optimize_1d", False)
        whole = ("tensor$", "head", MatrixAxes((0, 1), (2,)))
        arguments["rules"] = (
            [whole, ("", "head")] if everything else [("matrix$", "head"), ("", "bias")]
        )
    if name == "RMSprop" and "alpha" in arguments:
        arguments["b2"] = arguments.pop("alpha")
    if "betas" in arguments:
        betas = arguments.pop("betas")
        arguments |= {f"b{i}": beta for i, beta in enumerate(betas, start=1)}
    arguments = {_RENAMED.get(k, k): v for k, v in arguments.items()}
    arguments.pop(None, None)
    return builder(learning_rate, **arguments)


# name: (ravine's, Optax's), each a function of the learning rate.
OPTAX_CASES = {
    "sgd": (ravine.sgd, optax.sgd),
    "sgd, momentum": (
        lambda lr: ravine.sgd(lr, momentum=0.9),
        lambda lr: optax.sgd(lr, momentum=0.9),
    ),
    "sgd, nesterov": (
        lambda lr: ravine.sgd(lr, momentum=0.9, nesterov=True),
        lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
    ),
    "adam": (ravine.adam, optax.adam),
    "nadam": (ravine.nadam, optax.nadam),
    "adam, eps_root": (
        lambda lr: ravine.adam(lr, eps=0.0, eps_root=1e-4),
        lambda lr: optax.adam(lr, eps=0.0, eps_root=1e-4),
    ),
    "adamw": (lambda lr: ravine.adamw(lr, weight_decay=1e-4), optax.adamw),
    "nadamw": (
        lambda lr: ravine.nadamw(lr, b2=0.95, weight_decay=0.1),
        lambda lr: optax.nadamw(lr, b2=0.95, weight_decay=0.1),
    ),
    "lion": (lambda lr: ravine.lion(lr, weight_decay=1e-3), optax.lion),
    "adagrad": (
        lambda lr: ravine.adagrad(lr, initial_accumulator_value=0.1, eps=0.0, eps_root=1e-7),
        optax.adagrad,
    ),
    "rmsprop": (lambda lr: ravine.rmsprop(lr, 0.9, eps=0.0, eps_root=1e-8), optax.rmsprop),
    "rmsprop, eps outside": (
        lambda lr: ravine.rmsprop(lr, 0.9, eps=0.01),
        lambda lr: optax.rmsprop(lr, eps=0.01, eps_in_sqrt=False),
    ),
    "rmsprop, centered": (
        lambda lr: ravine.rmsprop(lr, 0.9, eps=0.0, eps_root=1e-4, centered=True),
        lambda lr: optax.rmsprop(lr, eps=1e-4, centered=True),
    ),
    "ademamix": (
        lambda lr: ravine.ademamix(lr, b3=0.99, alpha=5.0),
        lambda lr: optax.contrib.ademamix(lr, b3=0.99, alpha=5.0),
    ),
    # Optax multiplies by the learning rate before the momentum, ravine and torch after it. The two agree
    # only while the rate is constant.
    "rmsprop, nesterov, constant rate": (
        lambda lr: ravine.rmsprop(0.02, 0.9, eps=0.0, eps_root=1e-8, momentum=0.9, nesterov=True),
        lambda lr: optax.rmsprop(0.02, momentum=0.9, nesterov=True),
    ),
}


def trajectory(build, peak: float, dtype: str, *, restart_at: int = -1, averaged=False) -> dict:
    """Parameters after each of the golden steps, along a leading axis."""
    as_arrays = {"is_leaf": lambda x: not isinstance(x, dict)}
    leaf = lambda x: jnp.asarray(np.array(x), dtype)
    params = jax.tree.map(leaf, GOLDEN["initial"], **as_arrays)
    gradients = jax.tree.map(leaf, GOLDEN["gradients"], **as_arrays)
    rates = jnp.asarray(np.array(GOLDEN["learning_rate_factors"]) * peak, dtype)
    tx = optax.with_extra_args_support(build(lambda count: rates[count]))
    sophia = GOLDEN["sophia"]

    def step(carry, grads):
        params, state, index = carry
        # The squared gradient on sampled labels, times the tokens, which is Bartlett's estimator.
        estimate = lambda _, key: jax.tree.map(
            lambda g: sophia["tokens"] * jnp.square(sophia["sampled"] * g), grads
        )
        if restart_at >= 0:
            restarted = ravine.restart_adan(state)
            state = jax.tree.map(
                lambda new, old: jnp.where(index == restart_at, new, old), restarted, state
            )
        updates, state = tx.update(grads, state, params, curvature=estimate)
        params = optax.apply_updates(params, updates)
        seen = ravine.schedule_free_eval_params(state, params) if averaged else params
        return (params, state, index + 1), seen

    run = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p), jnp.int32(0)), g)[1])
    return jax.tree.map(np.asarray, run(params, gradients))


def worst_difference(mine: dict, reference: dict) -> float:
    """The largest max |a - b| / max |b| over all leaves, with a leading axis of steps.

    The maxima are over all steps, because a scalar may pass through zero at a single one.
    """
    worst = 0.0
    for name, leaf in reference.items():
        b = np.asarray(leaf, np.float64)
        a = np.asarray(mine[name], np.float64).reshape(b.shape)
        worst = max(worst, float(np.max(np.abs(a - b)) / np.max(np.abs(b))))
    return worst


def measure_golden(name: str, dtype: str) -> float:
    """The difference from the official implementation at the recorded steps."""
    case = GOLDEN["cases"][name]
    with jax.enable_x64(dtype == "float64"):
        mine = trajectory(
            lambda lr: ours(case, lr),
            case["peak_learning_rate"],
            dtype,
            restart_at=20 if "restarted" in name else -1,
            averaged="averaged" in name,
        )
    at = np.array([int(step) for step in case[dtype]]) - 1
    recorded = {k: [params[k] for params in case[dtype].values()] for k in mine}
    return worst_difference({k: x[at] for k, x in mine.items()}, recorded)


def measure_optax(name: str, dtype: str) -> float:
    """The difference from Optax over all steps."""
    mine, theirs = OPTAX_CASES[name]
    with jax.enable_x64(dtype == "float64"):
        a = trajectory(mine, 0.02, dtype)
        # Optax's bias correction raises a float to an int32 power.
        with jax.numpy_dtype_promotion("standard"):
            b = trajectory(theirs, 0.02, dtype)
    return worst_difference(a, b)


def cases() -> dict:
    """Maps a table row (algorithm, source) to a function from the dtype's name to the difference."""
    rows = {}
    for name, case in GOLDEN["cases"].items():
        source = f"{case['source']}, {case['version']}"
        rows[name, source] = lambda dtype, name=name: measure_golden(name, dtype)
    for name in OPTAX_CASES:
        rows[name, "Optax, as installed"] = lambda dtype, name=name: measure_optax(name, dtype)
    return rows


def bound(difference: float, dtype: str) -> float:
    """Twice the difference, at least eight units of rounding, rounded up to one significant digit.

    The slack allows for processors and compilers that fuse multiplications and additions differently.
    """
    x = max(2 * difference, 8 * float(np.finfo(dtype).eps))
    power = 10.0 ** math.floor(math.log10(x))
    return float(f"{math.ceil(x / power) * power:.0e}")


def render(differences: dict) -> str:
    """The page, given (algorithm, source) -> dtype -> difference."""
    lines = [
        "# Parity with the official implementations",
        "",
        f"{STEPS} steps on leaves of shapes (), (3,), (2, 5) and (3, 1, 4), with gradients of",
        "different sizes, some of them zero, and a learning rate that changes at every step. The",
        "difference is max |a - b| / max |b| over all steps of a leaf, the worst of the leaves;",
        "the table gives a bound, twice the difference measured (at least eight units of",
        "rounding), rounded up to one significant digit. The tests hold every row against its",
        "bound and against 1e-6 in float64 and 1e-5 in float32.",
        "",
        'L2 is a weight decay added to the gradient: `weight_decay_form="l2"`. Sophia\'s estimate is a',
        "given multiple of the gradient, squared, every ten steps.",
        "",
        "`tests/golden/first_order.py` regenerates the official trajectories,",
        "`python tests/golden/parity_table.py` this page.",
        "",
        "| algorithm | source | float64 | float32 |",
        "|---|---|---|---|",
    ]
    for (name, source), by_dtype in differences.items():
        bounds = " | ".join(f"{bound(by_dtype[d], d):.0e}" for d in TOLERANCES)
        lines.append(f"| {name} | {source} | {bounds} |")
    return "\n".join(lines) + "\n"


def committed_bounds() -> dict:
    """(algorithm, source) -> dtype -> bound, as read from the page."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (\S+e\S+) \| (\S+e\S+) \|$", TABLE.read_text(), re.M)
    return {(n, s): dict(zip(TOLERANCES, map(float, b), strict=True)) for n, s, *b in rows}


if __name__ == "__main__":
    measured = {row: {d: measure(d) for d in TOLERANCES} for row, measure in cases().items()}
    for row, by_dtype in measured.items():
        print(*row, by_dtype)
    TABLE.write_text(render(measured))
