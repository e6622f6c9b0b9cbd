"""Two parameters with one path, as of a key with a slash: told apart, or refused by both their keys."""

import jax
import numpy as np
import pytest
import ravine
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ravine.optimizers.own_norms import own_norms
from ravine.optimizers.roles import assign_roles, mask_by_role
from ravine.stability import with_monitors, with_noise_scale

BOTH = r"\['encoder'\]\['up'\]\['kernel'\] and \['encoder/up'\]\['kernel'\].*'encoder/up/kernel'.*rename"
SHAPES = {"nested": (3, 8), "flat": (8, 2)}


def tree(seed=0):
    """A model's own encoder beside that of another one, whose names are flat, as Haiku has them."""
    nested, flat = (
        jax.random.normal(jax.random.key(seed + at), shape)
        for at, shape in enumerate(SHAPES.values())
    )
    return {"encoder": {"up": {"kernel": nested}}, "encoder/up": {"kernel": flat}}


BY_ROLE = {
    name: getattr(ravine, name)
    for name in ("muon", "normuon", "shampoo", "soap", "soap_muon", "kl_shampoo", "mars")
}
BY_ROLE |= {
    "masked decay": lambda: ravine.adamw(weight_decay_mask=mask_by_role(["matrix"])),
    "combine_by_role": lambda: ravine.combine_by_role({"sgd": ravine.sgd(0.1)}, {"matrix": "sgd"}),
    "scale_by_width": lambda: ravine.scale_by_width("adamw", tree()),
    "with_telemetry": lambda: ravine.with_telemetry(ravine.adamw()),
    "with_monitors": lambda: with_monitors(ravine.adamw()),
    "with_noise_scale": lambda: with_noise_scale(ravine.adamw()),
}


@pytest.mark.parametrize("name", BY_ROLE)
def test_what_goes_by_names_refuses_them_at_init(name):
    with pytest.raises(ValueError, match=BOTH):
        BY_ROLE[name]().init(tree())


def test_what_tells_by_names_refuses_them():
    tx, params = ravine.scale_by_shampoo(), tree()
    for tell in (
        lambda: assign_roles(params),
        lambda: ravine.role_table(params),
        lambda: ravine.explain(ravine.adamw(), params),
        lambda: own_norms(tx, params, tx.init(params)),
    ):
        with pytest.raises(ValueError, match=BOTH):
            tell()


def test_other_optimizers_tell_them_apart():
    """The updates are those that each parameter has alone."""
    rename = lambda both: {"a": both["encoder"]["up"]["kernel"], "b": both["encoder/up"]["kernel"]}
    for tx in (ravine.adamw(0.1), ravine.scale_by_shampoo(), ravine.scale_by_soap()):
        params, grads = tree(), tree(seed=7)
        found, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
        params, grads = rename(params), rename(grads)
        expected, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
        jax.tree.map(np.testing.assert_array_equal, rename(found), expected)


def test_a_gradient_of_either_that_broadcasts_is_refused():
    params = tree()
    for key in ("encoder", "encoder/up"):
        narrow = jax.tree.map(lambda x: x[:, :1], params[key])
        tx = ravine.adamw(0.1)
        with pytest.raises(ValueError, match="gradient 'encoder/up/kernel' has shape"):
            tx.update({**params, key: narrow}, tx.init(params), params)


def test_each_has_its_own_specification_on_a_mesh():
    """That of the other one would not divide it."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    specs = {"encoder": {"up": {"kernel": P(None, "x")}}, "encoder/up": {"kernel": P("x")}}
    tx, params, grads = ravine.scale_by_adam(), tree(), tree(seed=7)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    tx = ravine.on_mesh(tx, specs, mesh)
    found, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
