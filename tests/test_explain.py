"""Explanations are derived from the optimizer itself: they describe what it really does."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import nnx

PARAMS = {
    "head": {"kernel": jnp.ones((8, 12))},
    "norm": {"scale": jnp.ones(8)},
    "strange": jnp.ones(3),
    "up": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
}
KNOWN = {name: value for name, value in PARAMS.items() if name != "strange"}


def rows(tx, params=KNOWN):
    return {row.path: row for row in ravine.explain(tx, params).rows}


def state_bytes(tx, params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


@pytest.mark.parametrize("name", ravine.names())
def test_bytes_add_up_for_every_optimizer(name):
    tx = getattr(ravine, name)(1e-3)
    found = ravine.explain(tx, KNOWN)
    total = sum(row.state_bytes for row in found.rows) + found.shared_bytes
    assert total == state_bytes(tx, KNOWN)
    assert found.shared_bytes < 100
    assert {row.learning_rate for row in found.rows} <= {"0.001", "1.5e-05"}
    assert all(row.optimizer not in ("-", "") for row in found.rows)


class Policy(NamedTuple):
    mu: jax.Array
    nu: jax.Array
    value: jax.Array


STATE_NAMES = {
    "dictionary": {
        "mu": jnp.ones((4, 3)),
        "log_sigma": jnp.zeros(3),
        "nu": jnp.ones(5),
        "count": jnp.ones(7),
    },
    "named tuple": {"policy": Policy(jnp.ones((4, 3)), jnp.ones(5), jnp.ones(7))},
}


@pytest.mark.parametrize("params", STATE_NAMES.values(), ids=STATE_NAMES)
@pytest.mark.parametrize(("tx", "per"), [(ravine.adamw(), 8), (ravine.sgd(0.1), 0)])
def test_parameters_with_the_names_of_states_have_their_own_bytes(tx, per, params):
    """A Gaussian policy has a mean called mu, as Adam's state has."""
    found = ravine.explain(tx, params).rows
    assert [row.state_bytes for row in found] == [per * math.prod(row.shape) for row in found]


def test_refused_roots_of_parameters_called_factors_are_theirs():
    params = {"factors": {"kernel": jnp.ones((4, 3))}, "kernel": jnp.ones((6, 3))}
    tx = ravine.shampoo(refresh={"every": 1}, roots={"tolerance": 0})
    _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    found = {path: len(roots) for path, roots in ravine.root_failures(state).items()}
    assert found == {"factors/kernel": 2, "kernel": 2}


def test_factors_called_factors_have_their_own_bytes():
    params = {"factors": {"kernel": jnp.ones((4, 3))}, "statistics": {"kernel": jnp.ones((6, 3))}}
    renamed = {"a": params["factors"], "b": params["statistics"]}
    for tx in (ravine.shampoo(), ravine.soap(), ravine.kl_shampoo()):
        own, other = (
            [row.state_bytes for row in ravine.explain(tx, tree).rows] for tree in (params, renamed)
        )
        assert own == other


def wrapped(tx):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), ravine.with_telemetry(tx))
    return optax.partition(
        {"train": clipped, "freeze": optax.set_to_zero()},
        lambda p: jax.tree_util.tree_map_with_path(
            lambda path, _: "freeze" if "norm" in str(path) else "train", p
        ),
    )


def test_it_sees_through_wrappers():
    decayed = ravine.optimizers.roles.mask_by_role(["matrix"])
    tx = ravine.shampoo(
        optax.linear_schedule(0.25, 0.5, 10),
        blocks=ravine.Blocks(size=4),
        weight_decay=0.1,
        weight_decay_mask=decayed,
    )
    plain, found = rows(tx), rows(wrapped(tx))
    assert plain["up/kernel"] == found["up/kernel"]
    kernel = found["up/kernel"]
    assert (kernel.role, kernel.optimizer) == ("matrix", "shampoo")
    assert kernel.how == "4 blocks of 4x3, factors of 4, 3"
    assert (kernel.learning_rate, kernel.decay) == ("schedule from 0.25", "0.1")
    assert (found["up/bias"].optimizer, found["up/bias"].decay) == ("adam", "")
    assert (plain["norm/scale"].optimizer, found["norm/scale"].optimizer) == ("adam", "-")
    assert found["norm/scale"].state_bytes == 0


def test_each_parameter_gets_what_the_table_says():
    """The updates confirm it: Muon's have the RMS of its scale, and frozen parameters have none."""
    tx = ravine.combine_by_role(
        {"m": ravine.muon(0.5), "s": ravine.sgd(0.25)},
        {"matrix": "m", "head": "s", "norm": "s", "bias": "s"},
    )
    found = rows(tx)
    assert {path: row.optimizer for path, row in found.items()} == {
        "head/kernel": "s",
        "norm/scale": "s",
        "up/bias": "s",
        "up/kernel": "muon",
    }
    grads = jax.tree.map(lambda p: jnp.full_like(p, 2.0), KNOWN)
    updates, _ = tx.update(grads, tx.init(KNOWN), KNOWN)
    np.testing.assert_allclose(
        updates["head"]["kernel"], -2.0 * float(found["head/kernel"].learning_rate)
    )
    assert abs(float(updates["up"]["kernel"][0, 0]) + 0.5) > 0.1


def test_optimizers_of_other_libraries():
    found = rows(optax.adamw(1e-3), PARAMS)
    assert {row.optimizer for row in found.values()} == {"Adam"}
    assert found["strange"].role == "other"
    assert found["up/kernel"].state_bytes == 2 * 4 * 48
    assert {row.learning_rate for row in found.values()} == {""}


@pytest.mark.parametrize(
    ("tx", "params", "problem"),
    [
        (KNOWN, ravine.adamw(1e-3), r"tx must be a gradient transformation .*, got \{"),
        (ravine.adamw, KNOWN, "tx must be a gradient transformation .*, got <function"),
        (
            ravine.adamw(1e-3),
            {"up": {"kernel": jnp.ones((2, 3)), "activation": jax.nn.relu}},
            r"the parameter 'up/activation' must be an array .* leave it out, as eqx\.filter",
        ),
    ],
    ids=["swapped", "builder", "a function among the parameters"],
)
def test_what_it_cannot_explain_is_named(tx, params, problem):
    with pytest.raises(ValueError, match=problem):
        ravine.explain(tx, params)
    with pytest.raises(ValueError, match=problem):
        ravine.role_table(params, tx=tx)


def test_a_key_in_the_state_counts_with_its_bytes():
    tx = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), ravine.muon(1e-3))
    found = ravine.explain(tx, KNOWN)
    total = sum(row.state_bytes for row in found.rows) + found.shared_bytes
    assert total == state_bytes(tx, KNOWN)


def test_a_table_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.mix = nnx.MultiHeadAttention(2, 8, rngs=rngs)
            self.before = nnx.LayerNorm(8, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    text = str(ravine.explain(ravine.soap(1e-3), params))
    header, *lines = text.splitlines()
    assert header.split()[:4] == ["path", "shape", "role", "matrices"]
    query = next(line for line in lines if line.startswith("mix/query/kernel"))
    assert "1 block of 8x8, factors of 8, 8" in query
    assert lines[-1].startswith("state: ")


def test_blocks_whose_roots_were_refused():
    params = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}
    grads = {"kernel": jnp.arange(24.0).reshape(4, 6) ** 2, "bias": jnp.ones(6)}
    for tolerance, blocks in ((10.0, 0), (0.0, 8)):
        tx = ravine.shampoo(
            1e-3,
            refresh=ravine.Refresh(every=1),
            blocks=ravine.Blocks(size=3),
            roots=ravine.Roots(tolerance=tolerance),
        )
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(2):
            _, state = update(grads, state, params)
        refused = ravine.root_failures(state)
        assert sum(map(len, refused.values())) == blocks
        assert all(root.refused == 2 for root in refused.get("kernel", ()))
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(1)), nnx.Param))
    assert {(r.axis, r.refused) for r in ravine.root_failures(optimizer.opt_state)["kernel"]} == {
        (0, 2),
        (1, 2),
    }
    assert ravine.root_failures(ravine.adamw(1e-3).init(params)) == {}


def test_with_blocks_only_a_vocabulary_or_an_explicit_bound_takes_a_factor():
    """`limit=8192` with `block=512` left a 4096 x 11008 kernel without a factor for its columns."""
    shapes = {
        "up": {"kernel": (4096, 11_008)},
        "embed": {"embedding": (32_000, 4096)},
        "lm_head": {"kernel": (4096, 32_000)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )

    def factors(**options):
        rows = ravine.explain(ravine.shampoo(1e-3, **options), params).rows
        return {row.path.split("/")[0]: row.how.partition("factors of ")[2] for row in rows}

    assert factors() == {"up": "512, 501", "embed": "none, 512", "lm_head": "512, none"}
    bounded = factors(blocks=ravine.Blocks(bound=8192))
    assert bounded == {"up": "512, none", "embed": "none, 512", "lm_head": "512, none"}
    whole = factors(blocks=ravine.Blocks(size=128, vocabulary=None))
    assert whole == {"up": "128, 128", "embed": "128, 128", "lm_head": "128, 128"}
