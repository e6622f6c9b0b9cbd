"""Schedules against Optax at every count, and against published formulas in double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ravine import schedules as s

from .schedules_table import SCHEDULE
from .tolerances import UNIT

T, W, PEAK = 1000, 100, 3e-3
COUNTS = jnp.arange(T)

# Near the end of a decay, Optax's values for one count and for many, jitted or not, differ by up to a
# thousand units in the last place (docs/log.md). These cases use its values for an array of counts.
OPTAX = {
    "constant": (s.constant(PEAK), optax.constant_schedule(PEAK)),
    "linear": (s.linear(PEAK, T, 0.1), optax.linear_schedule(PEAK, 0.1 * PEAK, T)),
    "decay to zero": (s.decay_to_zero(PEAK, T), optax.linear_schedule(PEAK, 0.0, T)),
    **{
        f"polynomial {power}": (
            s.polynomial(PEAK, T, 0.1, exponent=power),
            optax.polynomial_schedule(PEAK, 0.1 * PEAK, power, T),
        )
        for power in (1, 2, 3, 0.5, 0.7, 1.5)
    },
    **{
        f"cosine {alpha} {power}": (
            s.cosine(PEAK, T, alpha, exponent=power),
            optax.cosine_decay_schedule(PEAK, T, alpha, power),
        )
        for alpha in (0.0, 0.1, 0.03)
        for power in (1.0, 1.5, 2.0)
    },
    "exponential": (s.exponential(PEAK, T, 0.01), optax.exponential_decay(PEAK, T, 0.01)),
    "staircase": (
        s.step_decay(PEAK, 70, 0.3),
        optax.exponential_decay(PEAK, 70, 0.3, staircase=True),
    ),
    "piecewise": (
        s.piecewise(PEAK, [300, 700], [0.5, 0.05]),
        optax.piecewise_constant_schedule(PEAK, {300: 0.5, 700: 0.1}),
    ),
    "warm-up, constant": (
        s.warmup(s.constant(PEAK), W, from_zero=True),
        optax.warmup_constant_schedule(0.0, PEAK, W),
    ),
    "warm-up, cosine": (
        s.warmup(s.cosine(PEAK, T - W, 0.1), W, from_zero=True),
        optax.warmup_cosine_decay_schedule(0.0, PEAK, W, T, 0.1 * PEAK),
    ),
    "warm-up, exponential": (
        s.warmup(s.exponential(PEAK, T - W, 0.1), W, from_zero=True),
        optax.warmup_exponential_decay_schedule(0.0, PEAK, W, T - W, 0.1),
    ),
    "join": (
        s.join([s.linear(PEAK, 300, 0.5), s.cosine(PEAK, 300), s.constant(0.1)], [200, 700]),
        optax.join_schedules(
            [
                optax.linear_schedule(PEAK, 0.5 * PEAK, 300),
                optax.cosine_decay_schedule(PEAK, 300),
                optax.constant_schedule(0.1),
            ],
            [200, 700],
        ),
    ),
    "sgdr": (
        s.sgdr(PEAK, 700, 0.1, first_period=100, period_factor=2, peak_factor=0.5),
        optax.sgdr_schedule(
            [
                {
                    "init_value": PEAK * 0.5**i,
                    "peak_value": PEAK * 0.5**i,
                    "warmup_steps": 0,
                    "decay_steps": 100 * 2**i,
                    "end_value": 0.1 * PEAK * 0.5**i,
                }
                for i in range(3)
            ]
        ),
    ),
}
ONE_BY_ONE = {  # Optax accepts only one count at a time
    "one cycle, cosine": (s.one_cycle(PEAK, T), optax.cosine_onecycle_schedule(T, PEAK)),
    "one cycle, linear": (
        s.one_cycle(PEAK, T, end_ratio=4e-6, shape="linear"),
        optax.linear_onecycle_schedule(T, PEAK),
    ),
    **{
        f"piecewise, {kind}": (
            s.piecewise(PEAK, [300, 700], [0.5, 0.05], interpolate=kind),
            optax.piecewise_interpolate_schedule(kind, PEAK, {300: 0.5, 700: 0.1}),
        )
        for kind in ("linear", "cosine")
    },
}


@pytest.fixture
def _as_optax_needs():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("_as_optax_needs")
@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax_at_every_count(name):
    mine, theirs = OPTAX[name]
    expected = np.broadcast_to(np.asarray(theirs(COUNTS), np.float32), COUNTS.shape)
    np.testing.assert_array_max_ulp(np.asarray(mine(COUNTS)), expected, maxulp=1)


@pytest.mark.usefixtures("_as_optax_needs")
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_equals_what_optax_gives_one_by_one(name):
    """Up to a unit in the last place of the peak: cumulative products and a dot product round."""
    mine, theirs = ONE_BY_ONE[name]
    expected = np.asarray(jax.lax.map(theirs, COUNTS))
    assert np.abs(np.asarray(mine(COUNTS)) - expected).max() <= np.spacing(np.float32(PEAK))


# A power magnifies the rounding of its base: the square root of 0.001, by sixteen.
WITHOUT_POWERS = sorted(
    name for name in OPTAX if name.split()[-1] not in ("2", "3", "0.5", "0.7", "1.5", "2.0")
)


@pytest.mark.usefixtures("_as_optax_needs")
@pytest.mark.parametrize("name", WITHOUT_POWERS)
def test_is_as_near_the_truth_as_float32_goes(name):
    mine, theirs = OPTAX[name]
    with jax.enable_x64(True):
        truth = np.broadcast_to(theirs(jnp.arange(T, dtype=jnp.int64)), COUNTS.shape)
    largest = np.spacing(np.float32(np.abs(truth).max()))
    assert np.abs(np.asarray(mine(COUNTS), np.float64) - truth).max() <= 2 * largest


def after_warmup(body):
    return lambda t: t / W if t < W else body(t)


def share(t):
    return (t - W) / (T - W)


# huggingface/transformers, optimization.py: multiples of the peak, with warm-up from zero.
HUGGING_FACE = {
    "linear": (
        s.linear(1.0, T - W),
        lambda t: max(0.0, (T - t) / (T - W)),
    ),
    "cosine": (s.cosine(1.0, T - W), lambda t: 0.5 * (1 + math.cos(math.pi * share(t)))),
    "cosine with min_lr": (
        s.cosine(1.0, T - W, 0.1),
        lambda t: 0.5 * (1 + math.cos(math.pi * share(t))) * 0.9 + 0.1,
    ),
    "cosine with restarts": (
        s.sgdr(1.0, T - W, first_period=300, period_factor=1),
        lambda t: 0.5 * (1 + math.cos(math.pi * ((3 * (t - W)) % (T - W)) / (T - W))),
    ),
    "polynomial": (
        s.polynomial(1.0, T - W, 1e-4, exponent=2.0),
        lambda t: (1 - 1e-4) * (1 - share(t)) ** 2 + 1e-4,
    ),
    "inverse sqrt": (
        s.inverse_sqrt(1.0, W),
        lambda t: 1.0 / math.sqrt((t + (W - W)) / W),
    ),
    "wsd, 1-sqrt": (
        s.wsd(1.0, T - W, 0.1, decay_steps=200),
        lambda t: 1.0 if t < T - 200 else (1 - math.sqrt((t - T + 200) / 200)) * 0.9 + 0.1,
    ),
    "wsd, cosine": (
        s.wsd(1.0, T - W, decay_steps=200, shape="cosine"),
        lambda t: 1.0 if t < T - 200 else 0.5 * (1 + math.cos(math.pi * (t - T + 200) / 200)),
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_follows_hugging_face(name):
    body, formula = HUGGING_FACE[name]
    mine = np.asarray(s.warmup(body, W, from_zero=True)(COUNTS), np.float64)
    expected = [after_warmup(formula)(t) for t in range(T)]
    np.testing.assert_allclose(mine, expected, rtol=0, atol=SCHEDULE)


def olmo_wsds(t, periods, decays):
    """allenai/OLMo-core, optim/scheduler.py: periods with a plateau and a linear decay."""
    start = 0
    for i, (length, decay) in enumerate(zip(periods, decays, strict=True)):
        end = start + length
        if t < end or i == len(periods) - 1:
            return min(1.0, max(0.0, (end - t) / decay))
        start = end
    return None


OLMO = {
    "WSD": (
        s.warmup(s.wsd(1.0, T - W, decay_steps=100, shape="linear"), W, from_zero=True),
        lambda t: t / W if t < W else min(1.0, (T - t) / 100),
    ),
    "CosWithWarmup": (
        s.warmup(s.cosine(1.0, T - W, 0.1), W, from_zero=True),
        lambda t: t / W if t < W else 0.1 + 0.9 * (1 + math.cos(math.pi * share(t))) / 2,
    ),
    "InvSqrtWithWarmup": (
        s.warmup(s.inverse_sqrt(1.0, W), W, from_zero=True),
        lambda t: t / W if t < W else math.sqrt(W / max(t, W)),
    ),
    "LinearWithWarmup": (
        s.warmup(s.linear(1.0, T - W, 0.1), W, from_zero=True),
        lambda t: t / W if t < W else 1.0 - 0.9 * share(t),
    ),
    "WSDS": (
        s.wsd_s(1.0, T, 0.0, periods=[400, 600], decay_ratio=0.1, shape="linear"),
        lambda t: olmo_wsds(t, [400, 600], [40, 60]),
    ),
}


@pytest.mark.parametrize("name", OLMO)
def test_follows_olmo(name):
    schedule, formula = OLMO[name]
    mine = np.asarray(schedule(COUNTS), np.float64)
    np.testing.assert_allclose(mine, [formula(t) for t in range(T)], rtol=0, atol=SCHEDULE)


def test_the_table_of_the_cs336_assignment():
    """Maximum 1, minimum 0.1, warm-up 7, end of the cosine at 21, counts 0 to 24; by hand.

    Over 14 updates the angles are multiples of pi / 14. Their cosines are exact where a closed form
    exists, and otherwise come from a table of sines with six places.
    """
    cosines = [1, 0.974928, 0.900969, 0.781831, 0.623490, 0.433884, 0.222521, 0]
    cosines += [-c for c in cosines[-2::-1]]
    by_hand = [t / 7 for t in range(7)]
    by_hand += [0.1 + 0.9 * 0.5 * (1 + c) for c in cosines]
    by_hand += [0.1] * 3
    assert len(by_hand) == 25
    schedule = s.warmup(s.cosine(1.0, 14, 0.1), 7, from_zero=True)
    of_table = 0.45 * 0.5e-6  # six places
    np.testing.assert_allclose(schedule(jnp.arange(25)), by_hand, rtol=0, atol=of_table + SCHEDULE)


@pytest.mark.parametrize("first", [1, 7, 10])
@pytest.mark.parametrize("factor", [1, 2, 3, 1.5])
def test_restarts_are_on_their_boundaries_over_twenty_of_them(factor, first):
    numerator, denominator = {1.5: (3, 2)}.get(factor, (factor, 1))
    bounds = [  # twenty sums of periods over a common denominator
        first * sum(numerator**i * denominator ** (19 - i) for i in range(k)) // denominator**19
        for k in range(1, 21)
    ]
    # Counts are int32, which can represent the last restarts of factor 3 only if the first period is 1.
    bounds = [bound for bound in bounds if bound < 2**31 - 2]
    steps = bounds[-1] + 1
    schedule = s.sgdr(PEAK, steps, 0.1, first_period=first, period_factor=factor)
    assert s.restarts(first, factor, steps) == tuple(bounds)
    assert schedule.boundaries == (0, *bounds, steps)
    at = np.asarray(schedule(jnp.asarray(bounds)))
    np.testing.assert_array_equal(at, np.full(len(bounds), np.float32(PEAK)))
    before = np.asarray(schedule(jnp.asarray(bounds) - 1))
    longer = np.diff((0, *bounds)) > 1  # in a period of one count, the only count is its restart
    assert (before[longer] < 0.98 * PEAK).all()
    assert (
        np.diff(before.astype(np.float64)) <= 4 * UNIT * PEAK
    ).all()  # longer periods end at lower values


def test_the_original_transformer_and_t5():
    width, warm = 512, 40
    noam = [width**-0.5 * min((t + 1) ** -0.5, (t + 1) * warm**-1.5) for t in range(T)]
    np.testing.assert_allclose(s.noam((width * warm) ** -0.5, warm)(COUNTS), noam, rtol=8 * UNIT)
    t5 = [1 / math.sqrt(max(t, 100)) for t in range(T)]
    np.testing.assert_allclose(s.t5(0.1, 100)(COUNTS), t5, rtol=8 * UNIT)


def test_the_power_law():
    tokens = [t * 4096 for t in range(1, T)]
    law = [0.0] + [min(0.02, 8 * 4.6 * n**-0.51) for n in tokens]
    law[0] = 0.02
    # A power magnifies the rounding of a logarithm, and of the product, 0.51 log 1000 = 3.5 times.
    np.testing.assert_allclose(s.power_law(0.02, 4096, 8)(COUNTS), law, rtol=16 * UNIT)


@pytest.mark.parametrize(
    ("mode", "height"),
    [
        ("triangular", lambda t, cycle: 1.0),
        ("triangular2", lambda t, cycle: 0.5**cycle),
        ("exp_range", lambda t, cycle: float(np.float32(0.99)) ** t),
    ],
)
def test_smith_cycles_follow_pytorch(mode, height):
    """PyTorch's CyclicLR: x = 1 + t / total - cycle, with cycles counted from 1.

    The factor is the float32 value, because powers up to 999 would magnify its rounding.
    """

    def cyclic_lr(t):
        total, up = 50, 30
        cycle = math.floor(1 + t / total)
        x = 1.0 + t / total - cycle
        scale = x / (up / total) if x <= up / total else (x - 1) / (up / total - 1)
        return 0.1 + 0.9 * scale * height(t, cycle - 1)

    schedule = s.cyclic(1.0, 30, 20, low_ratio=0.1, mode=mode, factor=0.99)
    expected = [cyclic_lr(t) for t in range(T)]
    np.testing.assert_allclose(schedule(COUNTS), expected, rtol=0, atol=SCHEDULE)
