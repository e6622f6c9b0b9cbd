"""Small problems that are known to be hard, and which optimizers solve them, for docs/benchmarks.md.

    python benchmarks hard              # some minutes
    python benchmarks hard --no-write   # only print

Every optimizer gets the same nine learning rates, 1e-4 to 1, each decaying linearly to zero, and the
same 1,000 steps; it passes if one of them ends below the bound. The only parameter is a matrix of 8 by
8, so that all optimizers can take part. There is no weight decay.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ravine
from measure import heading, write
from ravine.optimizers.roles import IN_OUT

STEPS = 1000
RATES = jnp.asarray(np.geomspace(1e-4, 1.0, 9), jnp.float32)
SHAPE = (8, 8)


class Problem(NamedTuple):
    """A loss, its starting point, the noise of its gradient, and the loss that counts as solved."""

    loss: Callable[[jax.Array], jax.Array]
    start: jax.Array
    bound: float
    seen: Callable[[jax.Array, jax.Array], jax.Array] = lambda gradient, key: gradient


def _rotated(condition: float) -> Callable[[jax.Array], jax.Array]:
    """A quadratic in 64 numbers that no pair of Kronecker factors describes."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    hessian = jnp.asarray((basis * np.geomspace(1 / condition, 1, 64)) @ basis.T, jnp.float32)
    return lambda w: 0.5 * w.ravel() @ hessian @ w.ravel()


def _rosenbrock(w: jax.Array) -> jax.Array:
    x, y = w[:, ::2], w[:, 1::2]
    return jnp.mean(jnp.square(1 - x) + 100 * jnp.square(y - jnp.square(x)))


def _saddle(w: jax.Array) -> jax.Array:
    """Flat along half of the coordinates at the start; -1/4 at its minima."""
    x, y = w[:4], w[4:]
    return jnp.mean(jnp.square(x)) / 2 + jnp.mean(y**4 / 4 - jnp.square(y) / 2)


_NORMAL = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
_ONES = jnp.ones(SHAPE)
PROBLEMS = {
    "ill-conditioned (1e4)": Problem(_rotated(1e4), _NORMAL, 1e-3),
    "saddle": Problem(_saddle, jnp.concatenate([_ONES[:4], 1e-4 * _NORMAL[4:]]), -0.1225),
    "sharp turn (Rosenbrock)": Problem(_rosenbrock, -_ONES, 0.1),
    "sparse (5 % seen)": Problem(
        lambda w: jnp.mean(jnp.square(w)) / 2,
        _NORMAL,
        1e-3,
        lambda g, key: g * jax.random.bernoulli(key, 0.05, g.shape),
    ),
    "noisy (3 times the gradient)": Problem(
        lambda w: jnp.mean(jnp.square(w)) / 2,
        _NORMAL,
        2e-2,
        lambda g, key: g + 3 / 64 * jax.random.normal(key, g.shape),
    ),
    "heavy tails (Cauchy)": Problem(
        lambda w: jnp.mean(jnp.square(w)) / 2,
        _NORMAL,
        2e-2,
        lambda g, key: g + jax.random.cauchy(key, g.shape) / 256,
    ),
}
THEIRS = {
    name: getattr(optax, name) for name in ("sgd", "adam", "adamw", "lion", "rmsprop", "adagrad")
}


def builders() -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """Our optimizers by their registered names, and Optax's."""

    def ours(name: str) -> Callable[[Any], optax.GradientTransformation]:
        build = getattr(ravine, name)
        known = inspect.signature(build).parameters
        given: dict[str, Any] = {"rules": [(".*", "matrix", IN_OUT)]} if "rules" in known else {}
        if "weight_decay" in known:
            given["weight_decay"] = 0.0
        return lambda rate: build(rate, **given)

    found = {name: ours(name) for name in ravine.names() if not name.startswith("sophia")}
    found |= {f"optax.{name}": build for name, build in THEIRS.items()}
    for name in ("adamw", "lion"):
        found[f"optax.{name}"] = lambda rate, name=name: THEIRS[name](rate, weight_decay=0.0)
    found["optax.contrib.muon"] = lambda rate: optax.contrib.muon(rate)
    return found


def best(build: Callable[[Any], optax.GradientTransformation], problem: Problem) -> float:
    """The lowest final loss over the learning rates; for averaging optimizers, at the average."""

    def run(rate: jax.Array) -> jax.Array:
        tx = build(lambda count: rate * (1 - count / STEPS))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            gradient = problem.seen(jax.grad(problem.loss)(params["w"]), key)
            updates, state = tx.update({"w": gradient}, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"w": problem.start}
        keys = jax.random.split(jax.random.key(0), STEPS)
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), keys)
        return problem.loss(params["w"])

    losses = jax.jit(lambda rates: jax.lax.map(run, rates))(RATES)
    return float(jnp.min(jnp.where(jnp.isfinite(losses), losses, jnp.inf)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], help="names, as in the table")
    asked = parser.parse_args()
    lines = [
        *heading("python benchmarks hard"),
        f"| optimizer | {' | '.join(PROBLEMS)} |",
        f"|---|{'---|' * len(PROBLEMS)}",
    ]
    for name, build in builders().items():
        if asked.only and name not in asked.only:
            continue
        cells = []
        for problem in PROBLEMS.values():
            loss = best(build, problem)
            word = "pass" if loss <= problem.bound else "**fail**"
            cells.append(f"{word} ({loss:.2g})")
        jax.clear_caches()
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not asked.no_write:
        write("hard", lines)


if __name__ == "__main__":
    main()
