"""Refresh by need: which roots are kept, how many are refreshed, and that all fit afterwards."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ravine
from jax.sharding import PartitionSpec as P
from ravine.optimizers.matrix.algebra.eigenbasis import off_diagonal
from ravine.optimizers.matrix.algebra.roots import PseudoInverse, misfit
from ravine.optimizers.matrix.batch.phases import refreshed
from ravine.optimizers.matrix.batch.refresh import Need, Refresh
from ravine.optimizers.matrix.batch.together import Unit
from ravine.optimizers.matrix.mesh.placement import Spread
from ravine.optimizers.roles import IN_OUT

from .arrays import single
from .preconditioned import factors, refreshed_roots, run
from .tolerances import HALF, double, furthest

BLOCKS = ravine.Blocks(size=8)


def drifting(count, shape=(32, 16), seed=0):
    """Correlated gradients with power-law singular values. Their space rotates, except for the first
    block of 8 rows."""
    rng = np.random.default_rng(seed)
    rows, columns = ((1 + np.arange(n)) ** -1.0 for n in shape)
    left = [np.linalg.qr(rng.normal(size=(shape[0], shape[0])))[0] for _ in range(2)]
    found, past = [], rng.normal(size=shape)
    for t in range(count):
        past = 0.8 * past + 0.6 * rng.normal(size=shape)
        turned = np.linalg.qr(left[0] + t / count * left[1])[0]
        gradient = turned @ (rows[:, None] * columns * past)
        gradient[:8] = np.diag(rows[:8]) @ np.eye(8, shape[1])
        found.append(single(gradient))
    return found


@pytest.mark.parametrize("max_elements", [None, 9])
@pytest.mark.parametrize(
    ("most", "bounded", "expected"),
    [
        (1.0, True, [[1, 0], [1, 1, 0], [0]]),
        (0.3, True, [[1, 0], [0, 1, 0], [0]]),  # two of six: the worst
        (0.01, True, [[1, 0], [0, 0, 0], [0]]),
        (0.01, False, [[1, 0], [1, 1, 0], [0]]),
    ],
)
def test_the_worst_come_first(most, bounded, expected, max_elements):
    """Non-finite values come last among those in need, and roots that fit are left alone."""
    misfits = [[9.0, 0.5], [np.nan, 3.0, 0.1], [1.0]]
    sources = [single(m)[:, None, None] * jnp.ones((1, 3, 3)) for m in misfits]
    need = Need(lambda kind, carry, source: source[:, 0, 0], 1.0, most, bounded)

    @jax.jit
    def step(due):
        units = [Unit("a", source, jnp.zeros(len(source))) for source in sources]
        add = lambda kind, carry, source: carry + 1
        return refreshed(units, add, 1, lambda _: due, max_elements, need)

    for found, flags in zip(step(jnp.array(True)), expected, strict=True):
        np.testing.assert_array_equal(found, flags)
    assert not any(np.any(x) for x in step(jnp.array(False)))


@pytest.mark.parametrize("turn", [0, 1])
def test_the_worst_of_all_layers_that_are_due(turn):
    """Every second of eight two-block layers is due, and a quarter of their blocks is refreshed."""
    misfits = np.random.default_rng(0).permutation(16).reshape(8, 2)
    source = single(misfits)[..., None, None] * jnp.ones((1, 1, 3, 3))
    need = Need(lambda kind, carry, source: source[:, 0, 0], 1.0, 0.25)

    @jax.jit
    def step():
        unit = Unit("a", source, jnp.zeros((8, 2)), spread=Spread(batch_axes=2, layers=8))
        add = lambda kind, carry, source: carry + 1
        return refreshed([unit], add, 2, lambda phase: phase == turn, None, need)[0]

    due = np.where(np.arange(8)[:, None] % 2 == turn, misfits, 0)
    np.testing.assert_array_equal(step(), due >= np.sort(due, axis=None)[-2])


MAKERS = {
    "shampoo": functools.partial(ravine.scale_by_shampoo, blocks=BLOCKS),
    "soap": functools.partial(ravine.scale_by_soap, blocks=BLOCKS),
    "kl_shampoo": functools.partial(ravine.scale_by_kl_shampoo, blocks=BLOCKS, balance=False),
}


@pytest.mark.parametrize(
    "name",
    ["shampoo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("soap", "kl_shampoo"))],
)
def test_between_the_clock_and_never(name):
    with jax.enable_x64(True):
        gradients, make = double(drifting(6)), MAKERS[name]
        updates = lambda **options: run(make(refresh=Refresh(**options)), gradients)[0]
        clock, always = updates(every=2), updates(every=2, need=1e-9)
        assert furthest(always, clock) <= HALF
        if name != "shampoo":  # its roots start from the identity, which is a very bad fit
            assert furthest(updates(every=2, need=10.0), updates(every=100)) <= HALF


def test_soap_turns_only_bases_that_do_not_fit():
    """They fit better afterwards, although one QR step may not be enough."""
    gradients = drifting(12)
    tx = MAKERS["soap"](b2=0.8, refresh=Refresh(every=1, need=0.1))
    _, states = run(tx, gradients)
    turned = 0
    for before, after in itertools.pairwise(states):
        pairs = list(zip(before.bases[0], after.bases[0], strict=True))
        flat = lambda x: x.reshape(-1, *x.shape[-2:])
        off = [off_diagonal(flat(b.statistics), flat(a.vectors)) for a, b in pairs]
        moved = [jnp.any(flat(a.vectors != b.vectors), axis=(1, 2)) for a, b in pairs]
        needed = (off[0] > 0.1) | (off[1] > 0.1)  # both sides of a block are rotated together
        np.testing.assert_array_equal(moved[0] | moved[1], needed)
        turned += int(jnp.sum(needed))
    assert 0 < turned < 8 * 10
    assert not np.any(moved[0][:2])  # the blocks whose space does not rotate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soap", "kl_shampoo"])
def test_the_first_bases_are_found_however_well_the_identity_fits(name):
    """Statistics of diagonal gradients are diagonal, but the largest eigenvalue comes first."""
    gradient = jnp.diag(jnp.array([1.0, 2.0, 3.0, 4.0]))
    refresh = ravine.Refresh(every=5, need=0.5)
    tx = getattr(ravine, f"scale_by_{name}")(axes=IN_OUT, refresh=refresh)
    _, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    (((left, right),),) = (state.bases if name == "soap" else state.factors,)
    for basis in (left, right):
        vectors = np.abs(np.asarray(basis.vectors)).reshape(4, 4)
        np.testing.assert_allclose(vectors, np.eye(4)[::-1], atol=1e-6)


def test_all_roots_fit_that_are_not_refused():
    tx = MAKERS["shampoo"](b2=0.8, roots={"ridge": 1e-3}, refresh=Refresh(every=1, need=0.5))
    _, states = run(tx, drifting(8))
    kept = 0
    for at, (before, after) in enumerate(itertools.pairwise(states), 2):
        kept += int(np.sum(~refreshed_roots(before, after)))
        for factor in factors(after):
            flat = lambda x: x.reshape(-1, *x.shape[-2:])
            weighed = flat(factor.statistics) / (1 - 0.8**at)
            off = misfit(weighed, flat(factor.root), -1 / 4, ridge=1e-3)
            assert jnp.all((off <= 0.51) | (factor.failures.ravel() > 0))
    assert kept


@pytest.mark.parametrize("staggered", [False, True])
def test_no_more_than_the_bound_once_it_has_started(staggered):
    refresh = Refresh(every=2, need=1e-6, most=0.25, staggered=staggered)
    _, states = run(MAKERS["shampoo"](b2=0.8, roots={"ridge": 1e-3}, refresh=refresh), drifting(8))
    # The first refresh exceeds the bound and takes all in need: all roots, or the phase that is due.
    assert sum(refreshed_roots(states[0], states[1])) > (2 if staggered else 4)
    for at, (before, after) in enumerate(itertools.pairwise(states), 2):
        if at > 2:
            assert sum(refreshed_roots(before, after)) <= 4


def test_devices_agree_on_what_they_repeat():
    """A leaf that both devices hold whole is not ranked against a leaf that they share."""
    rng = np.random.default_rng(0)
    specs, shapes = {"whole": P(), "shared": P("x")}, {"whole": (4, 4), "shared": (2, 4, 4)}
    tx = ravine.scale_by_shampoo(
        b2=0.9,
        refresh=Refresh(every=1, need=1e-3, most=0.25),
        blocks=ravine.Blocks(size=4),
        axes=lambda path: IN_OUT,
    )
    with jax.set_mesh(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])):
        put = lambda tree: {name: jax.device_put(x, specs[name]) for name, x in tree.items()}
        drawn = lambda: {name: single(rng.normal(size=shape)) for name, shape in shapes.items()}
        state = jax.jit(tx.init)(put(drawn()))
        _, state = jax.jit(tx.update)(put(drawn()), state)
        before = state.factors["whole"][0]
        grads = drawn()
        # The first device's part of the shared leaf fits worst, the second device's best.
        grads["shared"] *= single([100.0, 0.0])[:, None, None]
        _, state = jax.jit(tx.update)(put(grads), state)
    roots = [factor.root for factor in state.factors["whole"][0]]
    for root in roots:
        first, second = (np.asarray(shard.data) for shard in root.addressable_shards)
        np.testing.assert_array_equal(first, second)
    assert sum(bool(np.any(b.root != r)) for b, r in zip(before, roots, strict=True)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"need": 0.0}, r"refresh\.need must be positive"),
        ({"need": 0.1, "most": 0.0}, r"refresh\.most must lie in \(0, 1\]"),
        ({"most": 0.5}, r"give refresh\.need too"),
        ({"statistics_every": 11}, r"refresh\.statistics_every must be at most 10"),
        (
            {"statistics_every": 0},
            r"refresh\.statistics_every must be a whole number of at least 1",
        ),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        Refresh(**options)
    with pytest.raises(ValueError, match=words):
        ravine.OptimizerConfig("soap", {"refresh": options})


def test_a_pseudo_inverse_fits_nothing():
    with pytest.raises(ValueError, match="take Eigh"):
        ravine.shampoo(1e-3, refresh={"need": 0.1}, roots={"method": PseudoInverse()})


def test_the_explanation_mentions_it():
    tx = ravine.soap(1e-3, refresh={"every": 1, "need": 0.1, "most": 0.25})
    (row,) = ravine.explain(tx, {"kernel": jnp.ones((4, 2))}).rows
    assert row.how.endswith(", refreshed if off by 0.1, at most 0.25")
