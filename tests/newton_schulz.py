"""Newton-Schulz in float64, and how far random rounding to bfloat16 moves the result."""

import numpy as np
from ravine.optimizers.matrix.algebra.coefficients import named_coefficients


def turned(x):
    return np.swapaxes(x, 1, 2)


def by_hand(x, form, rounded=lambda x: x):
    """Keller's five steps for matrices [K, m, n] with m <= n; the inputs of every product are rounded.

    In Gram form, the fourth step starts again from the matrices.
    """
    times = lambda left, right: rounded(left) @ rounded(right)
    x = rounded(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))
    eye, q = np.eye(x.shape[1]), None
    for at, (a, b, c) in enumerate(named_coefficients("keller", 5)):
        if form == "standard":
            gram = times(x, turned(x))
            x = rounded(a * x + times(b * gram + c * times(gram, gram), x))
            continue
        if at in (0, 3):
            x = x if q is None else rounded(times(q, x))
            start, q = times(x, turned(x)), None
        r = start if q is None else times(times(q, start), turned(q))
        p = a * eye + b * r + c * times(r, r)
        q = p if q is None else times(p, q)
    return x if q is None else times(q, x)


def relative_norm(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def of_bfloat16(x, form):
    """The norm of the error that random rounding to bfloat16 adds, relative to the result.

    Rounding moves an element by up to half a unit in the last place. This is the largest error of three
    tries, which agree to within a few percent for large matrices.
    """

    def moved(x, rng):
        half = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) - 8)
        return x + half * rng.uniform(-1, 1, x.shape)

    x = np.asarray(x, np.float64)
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    tries = [by_hand(x, form, lambda x, rng=rng: moved(x, rng)) for rng in rngs]
    return max(relative_norm(found, by_hand(x, form)) for found in tries)
