"""Roles: a rule decides every parameter, including rows and columns, in models of each kind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ravine
from flax import linen as nn
from flax import nnx
from ravine.optimizers.matrix.shape.layout import MatrixAxes, layout
from ravine.optimizers.roles import (
    ATTENTION_IN,
    ATTENTION_OUT,
    COMMON_RULES,
    LINEN_RULES,
    NNX_RULES,
    RAVINE_RULES,
    Rule,
    assign_roles,
    axes_from_names,
    axes_of_path,
    layouts,
    mask_by_role,
    role_table,
)
from ravine.training.model import ModelConfig, Transformer
from ravine.training.step import init_params

from .decided import decided, shapes
from .tolerances import UNIT

SMALL = ModelConfig(vocabulary=32, context=8, width=16, layers=2, heads=2, feed_forward=48)
KERNEL_AND_SCALE = [("scale$", "norm"), ("kernel$", "matrix")]


# The rules themselves.


def test_the_first_rule_that_matches_decides():
    params = {"head": {"kernel": jnp.ones((2, 3))}, "up": {"kernel": jnp.ones((2, 3))}}
    rules = [("head/kernel$", "head"), ("kernel$", "matrix")]
    assert assign_roles(params, rules) == {"head": {"kernel": "head"}, "up": {"kernel": "matrix"}}
    with pytest.raises(ValueError, match=r"'head/kernel\$' decides no parameter"):
        assign_roles(params, rules[::-1])


def test_tuples_of_two_three_and_four_are_rules():
    axes = MatrixAxes((1,), (0,))
    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3), "w": jnp.ones((2, 3))}
    rules = [("scale$", "norm"), ("kernel$", "matrix", axes), ("w$", "matrix", None)]
    assert decided(params, [*rules, ("nothing", "router", None, False)]) == {
        "kernel": ("matrix", ((1, 3, 2),)),
        "scale": ("norm", None),
        "w": ("matrix", ((1, 2, 3),)),
    }


def test_what_no_rule_covers_is_refused_by_path():
    params = {"deep": {"kernel": jnp.ones((2, 3)), "odd": jnp.ones(3)}}
    for function in (assign_roles, layouts, role_table):
        with pytest.raises(ValueError, match=r"1 of 2 parameters[\s\S]*deep/odd  \(3,\)"):
            function(params, [("kernel$", "matrix")])
    with pytest.raises(ValueError, match="'deep/odd'; add"):
        axes_of_path("deep/odd", [("kernel$", "matrix")])


@pytest.mark.parametrize(
    ("leaf", "problem"),
    [
        (jnp.arange(3), "has dtype int32, .*; cast it, or leave it"),
        (jnp.ones(3, complex), "has dtype complex64, .*; cast it, or leave it"),
        (jax.random.key(0), "has dtype key<.*; cast it, or leave it"),
        (True, r"is a bool, but optimizers take arrays; make it one, or leave it .*eqx\.filter"),
        (jax.nn.relu, r"is a \w+, but optimizers take arrays; .*eqx\.filter"),
    ],
)
def test_what_is_not_a_parameter_is_refused_as_such_without_a_rule_for_it(leaf, problem):
    params = {"dense": {"kernel": jnp.ones((2, 3))}, "table": leaf}
    with pytest.raises(TypeError, match=rf"parameter \['table'\] {problem}"):
        ravine.muon(0.1).init(params)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        (("kernel$",), r"\('kernel\$',\) is not a tuple \(pattern, role\)"),
        ("kernel$", r"'kernel\$' is not a tuple"),
        (3, "3 is not a tuple"),
        ((3, "matrix"), "for 3 has pattern=3; give a regular expression"),
        (("kernel$", "matrix", (0, 1)), r"axes=\(0, 1\); give ravine.MatrixAxes"),
        (("kernel$", "matrix", None, "no"), "required='no'; give True or False"),
        (Rule("kernel$", "matrix", ndim="2"), "ndim='2'; give a whole number"),
        (Rule("kernel$", "matrix", where=3), "where=3; give a function"),
    ],
)
def test_what_is_not_a_rule_is_refused_where_it_is_given(rule, problem):
    with pytest.raises(ValueError, match=problem):
        ravine.optimizers.roles.complete([rule])
    with pytest.raises(ValueError, match="rule"):
        ravine.muon(0.1, rules=[rule])


def test_one_axis_may_be_a_number_and_axes_a_list():
    axes = MatrixAxes((-1,), (-2,))
    assert MatrixAxes(-1, -2) == MatrixAxes([-1], [-2]) == axes  # type: ignore[arg-type]
    assert hash(MatrixAxes([-1], -2)) == hash(axes)  # type: ignore[arg-type]
    parts = MatrixAxes(-1, -2, [2, 1])  # type: ignore[arg-type]
    assert hash(parts) == hash(MatrixAxes((-1,), (-2,), (2, 1)))


def test_a_rule_without_parameters_is_refused_unless_optional():
    params = {"kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"'scale\$' decides no parameter.*required=False"):
        assign_roles(params, [("kernel$", "matrix"), ("scale$", "norm")])
    rules = [("kernel$", "matrix"), Rule("scale$", "norm", required=False)]
    assert assign_roles(params, rules) == {"kernel": "matrix"}
    assert assign_roles({}, KERNEL_AND_SCALE) == {}


def test_a_scanned_norm_is_not_a_matrix():
    params = shapes({"kernel": (4, 8, 16), "scale": (4, 8)})
    assert decided(params, KERNEL_AND_SCALE) == {
        "kernel": ("matrix", ((4, 8, 16),)),
        "scale": ("norm", None),
    }


def test_a_vector_that_is_called_a_matrix_is_refused():
    # All of them at once, with rules to paste.
    params = {"mlp": {"scale": (8,)}, "out": {"scale": (4,)}, "w": {"scale": (8, 4)}}
    with pytest.raises(ValueError, match="2 of 3 parameters") as refused:
        layouts(shapes(params), [("scale$", "matrix")])
    assert re.search(
        r"mlp/scale  \(8,\)  a matrix, but it has fewer than two axes", str(refused.value)
    )
    assert "(r'^out/scale$', 'norm')," in str(refused.value)
    with pytest.raises(ValueError, match=r"conv/kernel  \(4, 5\)  a convolution: which axes"):
        layouts(shapes({"conv": {"kernel": (4, 5)}}), [("kernel$", "convolution")])


def test_other_roles_can_hold_matrices_too():
    params = shapes({"head": {"kernel": (8, 32)}, "kernel": (8, 8)})
    rules = [Rule("head/kernel$", "head", MatrixAxes((1,), (0,))), ("kernel$", "matrix")]
    assert layouts(params, rules)["head"]["kernel"] is None
    assert layouts(params, rules, ["head"])["kernel"] is None
    assert layouts(params, rules, ["head"])["head"]["kernel"].pieces == ((1, 32, 8),)


def test_layouts_map_with_their_parameters():
    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    found = layouts(params, KERNEL_AND_SCALE)
    moved = jax.tree.map(
        lambda leaf_layout, leaf: leaf if leaf_layout is None else leaf_layout.to_matrices(leaf)[0],
        found,
        params,
        is_leaf=lambda leaf: leaf is None,
    )
    assert jax.tree.map(jnp.shape, moved) == {"kernel": (1, 2, 3), "scale": (3,)}


def test_axes_of_a_path():
    assert axes_of_path("x/query/kernel", NNX_RULES, ndim=3) == ATTENTION_IN
    assert axes_of_path("x/out/kernel", NNX_RULES, ndim=3) == ATTENTION_OUT
    assert axes_of_path("x/query/kernel", NNX_RULES, ndim=2) == MatrixAxes((-2,), (-1,))
    with pytest.raises(ValueError, match=r"which of the 3 axes of 'x/up/kernel'"):
        axes_of_path("x/up/kernel", ndim=3)
    assert axes_of_path("x/up/kernel", NNX_RULES) == MatrixAxes((-2,), (-1,))


def test_a_dictionary_may_have_an_entry_called_value():
    params = {"attention": {"key": jnp.ones((2, 2)), "value": jnp.ones((2, 2))}}
    roles = assign_roles(params, [("key$", "matrix"), ("attention/value$", "head")])
    assert roles == {"attention": {"key": "matrix", "value": "head"}}
    state = nnx.State({"value": nnx.Param(jnp.ones(2))})
    assert decided(state, [("^value$", "norm")]) == {"value": ("norm", None)}


# The predefined rules on real models.


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, normalize_qk=True)(nn.LayerNorm()(x))
        x = nn.RMSNorm()(x)
        x = nn.Conv(6, (3, 3))(x[..., None])
        x = nn.ConvTranspose(4, (3, 3))(x)
        x = nn.GroupNorm(2)(x)
        x = nn.Dense(5)(x)
        return nn.Dense(11, name="logits")(x)


@pytest.mark.parametrize("rules", [LINEN_RULES, COMMON_RULES], ids=["linen", "common"])
def test_a_linen_model(rules):
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    params = jax.eval_shape(LinenModel().init, jax.random.key(0), tokens)
    found = {path.removeprefix("params/"): value for path, value in decided(params, rules).items()}
    matrices = {path: value for path, value in found.items() if value[1]}
    attention = "MultiHeadDotProductAttention_0"
    assert matrices == {
        **{
            f"{attention}/{name}/kernel": ("matrix", ((1, 8, 8),))
            for name in ("query", "key", "value")
        },
        f"{attention}/out/kernel": ("matrix", ((1, 8, 8),)),
        "Conv_0/kernel": ("convolution", ((1, 9, 6),)),
        "ConvTranspose_0/kernel": ("convolution", ((1, 54, 4),)),
        "Dense_0/kernel": ("matrix", ((1, 4, 5),)),
    }
    assert found["Embed_0/embedding"][0] == "embedding"
    assert found["logits/kernel"][0] == "head"
    for path, (role, _) in found.items():
        if path.endswith("scale"):
            assert role == "norm"
        if path.endswith("bias"):
            assert role == "bias"
    assert sum(role == "norm" for role, _ in found.values()) == 5


def test_heads_are_rows_of_the_output_and_columns_of_the_input(getkey):
    attention = nn.MultiHeadDotProductAttention(2, use_bias=False)
    x = jax.random.normal(getkey(), (1, 1, 8))
    params = attention.init(getkey(), x)
    # A single position attends to itself, so the output is its value.
    expected = attention.apply(params, x)
    wrapped = {"MultiHeadDotProductAttention_0": params["params"]}
    found = layouts(wrapped, LINEN_RULES)["MultiHeadDotProductAttention_0"]
    value, out = (
        found[name]["kernel"].to_matrices(params["params"][name]["kernel"])[0][0]
        for name in ("value", "out")
    )
    # Two products with sums of eight, on both sides; the order of the sums differs.
    bound = 2 * 2 * 8 * UNIT * (np.abs(x[0]) @ np.abs(value) @ np.abs(out))
    assert np.all(np.abs(x[0] @ value @ out - expected[0]) <= bound)


@pytest.mark.parametrize("rules", [LINEN_RULES, COMMON_RULES], ids=["linen", "common"])
@pytest.mark.parametrize(
    "module", ["attention/query", "attention/out", "DenseGeneral_0", "Einsum_0"]
)
def test_kernels_whose_axes_a_path_does_not_tell_are_refused(rules, module):
    first, *rest = module.split("/")
    kernel = {"kernel": jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)}
    params = {first: {rest[0]: kernel} if rest else kernel}
    with pytest.raises(ValueError, match=rf"{module}/kernel +\(8, 2, 4\)  a matrix: which axes"):
        layouts(params, rules)
    own = [Rule(f"{module}/kernel$", "matrix", ATTENTION_IN), *rules]
    assert decided(params, own)[f"{module}/kernel"] == ("matrix", ((1, 8, 8),))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, normalize_qk=True, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.adapter = nnx.LoRA(8, 3, 5, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.conv_in = nnx.Conv(3, 8, (2, 2), rngs=rngs)
        self.first = NnxBlock(rngs)
        stacked = nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0)
        self.blocks = stacked(rngs.split(4))
        self.lm_head = nnx.Linear(8, 11, rngs=rngs)


def test_an_nnx_model():
    state = nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)
    found = decided(state, NNX_RULES)
    matrices = {path: value for path, value in found.items() if value[1]}
    expected = {"conv_in/kernel": ("convolution", ((1, 12, 8),))}
    for block, length in (("first", 1), ("blocks", 4)):
        for name in ("query", "key", "value", "out"):
            expected[f"{block}/attention/{name}/kernel"] = ("matrix", ((length, 8, 8),))
        expected[f"{block}/up/kernel"] = ("matrix", ((length, 8, 32),))
        expected[f"{block}/adapter/lora_a"] = ("matrix", ((length, 8, 3),))
        expected[f"{block}/adapter/lora_b"] = ("matrix", ((length, 3, 5),))
    assert matrices == expected
    assert found["tokens/embedding"][0] == "embedding"
    assert found["lm_head/kernel"][0] == "head"
    assert found["lm_head/bias"][0] == "bias"
    assert found["blocks/norm/scale"][0] == "norm"  # [4, 8]
    assert found["blocks/attention/query_ln/scale"][0] == "norm"
    assert decided(state, None) == found


@pytest.mark.parametrize("rules", [RAVINE_RULES, COMMON_RULES], ids=["ravine", "common"])
def test_the_training_model(rules):
    state = nnx.state(nnx.eval_shape(lambda: Transformer(SMALL, rngs=nnx.Rngs(0))), nnx.Param)
    _, params = init_params(SMALL, 0)
    found = decided(params, rules)
    assert decided(state, rules) == found
    matrices = {path: pieces for path, (_, pieces) in found.items() if pieces}
    assert matrices == {
        **{
            f"layers/attention/{name}/kernel": ((2, 16, 16),)
            for name in ("key", "output", "query", "value")
        },
        "layers/feed_forward/gate/kernel": ((2, 16, 48),),
        "layers/feed_forward/up/kernel": ((2, 16, 48),),
        "layers/feed_forward/down/kernel": ((2, 48, 16),),
    }
    assert {role for role, _ in found.values()} == {"embedding", "head", "matrix", "norm"}


# Axes given by name.


def test_names_of_an_nnx_variable():
    # Outside a mesh; inside one, eager_sharding is not needed.
    init = nnx.with_partitioning(
        nnx.initializers.ones_init(), ("embed", "heads", "kv"), eager_sharding=False
    )

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stacked(rngs):
        return nnx.LinearGeneral(4, (2, 5), use_bias=False, kernel_init=init, rngs=rngs)

    kernel = stacked(nnx.Rngs(0)).kernel
    names = kernel.get_metadata()["out_sharding"]
    assert names == ("layers", "embed", "heads", "kv")
    axes = axes_from_names(names, {"embed"}, {"heads", "kv"})
    assert axes == MatrixAxes((1,), (2, 3))
    assert layout(kernel.shape, axes).pieces == ((3, 4, 10),)


def test_names_of_a_linen_box():
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed", "mlp"))
    model = nn.Dense(5, kernel_init=init)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3)))["params"]
    box = params["kernel"]
    assert isinstance(box, nn.LogicallyPartitioned)
    assert axes_from_names(box.names, ["embed"], ["mlp"]) == MatrixAxes((0,), (1,))
    # Boxed parameters have the same paths as unboxed ones.
    boxed = decided({"Dense_0": params}, LINEN_RULES)
    assert boxed == decided({"Dense_0": nn.meta.unbox(params)}, LINEN_RULES)
    assert boxed["Dense_0/kernel"] == ("matrix", ((1, 3, 5),))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("embed", "vocab"), "'vocab'.*in none"),
        (("embed", None), "None.*in none"),
        (("embed", "both"), "'both'.*in rows and columns"),
        (("embed", "mlp", "mlp"), "name 'mlp' .* must occur once .* but is in columns"),
        (("embed", "layers"), r"no axis of .* or none in columns; name one in each"),
        (("mlp", "layers"), r"no axis of .* is in rows, or none in columns"),
        ((), r"no axis of \(\) is in rows"),
        ("embed", "the axis name 'e' of .* but is in none"),
    ],
)
def test_bad_names_are_refused(names, problem):
    with pytest.raises(ValueError, match=problem):
        axes_from_names(names, rows={"embed", "both"}, columns={"mlp", "both"})


# Uses of roles.


def test_the_table():
    params = {
        "attention": {"query": {"kernel": jax.ShapeDtypeStruct((2, 8, 12), jnp.float32)}},
        "norm": {"scale": jax.ShapeDtypeStruct((2, 8), jnp.float32)},
    }
    axes = MatrixAxes((-2,), (-1,), column_parts=(8, 4))
    rules = [Rule("kernel$", "matrix", axes), ("scale$", "norm")]
    decayed = mask_by_role(["matrix"], rules)
    tx = ravine.muon(0.1, rules=rules, weight_decay=0.5, weight_decay_mask=decayed)
    table = role_table(params, rules, tx)
    header, query, norm = table.splitlines()
    assert header.split() == ["path", "shape", "role", "matrices", "optimizer", "decay"]
    assert "[batch 2, rows 8, columns 8] + [batch 2, rows 8, columns 4]  muon       0.5" in query
    assert norm.split() == ["norm/scale", "(2,", "8)", "norm", "-", "adam", "no"]
    for title in header.split()[1:]:  # columns are aligned
        assert all(line[header.index(title) - 1] == " " for line in (query, norm))
    assert role_table(params, rules).splitlines()[1].split()[-2:] == ["-", "-"]


def test_a_mask_in_a_transformation():
    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    tx = ravine.adamw(
        0.1, weight_decay=1.0, weight_decay_mask=mask_by_role(["matrix"], KERNEL_AND_SCALE)
    )
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_flattened_parameters_are_refused_for_what_they_lost():
    with pytest.raises(ValueError, match=r"\(72,\)  no role rule matches, .* optax.flatten loses"):
        optax.flatten(ravine.muon(0.01)).init({"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)})
