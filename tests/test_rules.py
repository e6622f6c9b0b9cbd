"""The predefined rules, tested on everything that Flax, Equinox and Haiku ship and on common names."""

import inspect
import pathlib
import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
import ravine
from flax import linen as nn
from flax import nnx
from ravine.optimizers.matrix.shape.layout import MatrixAxes
from ravine.optimizers.roles import (
    EQUINOX_RULES,
    HAIKU_RULES,
    HUGGING_FACE_RULES,
    NNX_RULES,
    Rule,
    decide,
    role_table,
)

from .decided import shapes

KEY = jax.random.key(0)
MATRICES = ("matrix", "convolution", "embedding", "head")


def decided(params, rules=None):
    """A dictionary from path to role, and for matrices to role, rows and columns of each piece."""
    found = {}
    for d in decide(params, rules, MATRICES):
        role = d.role
        found[d.path] = (role, *d.layout().pieces) if role in MATRICES else role
    return found


def asked(params, rules=None):
    """The paths for which the error asks for a rule."""
    with pytest.raises(ValueError, match="match no role rule, or it is not known") as refused:
        decide(params, rules, MATRICES)
    return set(re.findall(r"^  (\S+)  +\(", str(refused.value), re.M))


# Everything Flax NNX ships, under a user's own names.


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        linear = lambda: nnx.Linear(4, 6, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.conv1 = nnx.Conv(3, 8, (5,), rngs=rngs)
        self.my_conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv3d = nnx.Conv(3, 8, (2, 2, 2), rngs=rngs)
        self.upconv = nnx.ConvTranspose(3, 8, (3, 3), rngs=rngs)
        self.tokens = nnx.Embed(11, 4, rngs=rngs)
        self.cell = nnx.GRUCell(4, 6, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.instance = nnx.InstanceNorm(4, rngs=rngs)
        self.memory = nnx.LSTMCell(4, 6, rngs=rngs)
        self.fast_memory = nnx.OptimizedLSTMCell(4, 6, rngs=rngs)
        self.plain_cell = nnx.SimpleCell(4, 6, rngs=rngs)
        self.before = nnx.LayerNorm(4, rngs=rngs)
        self.after = nnx.RMSNorm(4, rngs=rngs)
        self.adapter = nnx.LoRA(4, 2, 5, rngs=rngs)
        self.adapted = nnx.LoRALinear(4, 5, lora_rank=2, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 8, normalize_qk=True, rngs=rngs)
        self.slope = nnx.PReLU()
        self.spectral = nnx.SpectralNorm(linear(), rngs=rngs)
        self.weighted = nnx.WeightNorm(linear(), rngs=rngs)
        self.both = nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(4, 6, rngs=rngs)), nnx.RNN(nnx.LSTMCell(4, 6, rngs=rngs))
        )
        self.steps = nnx.Sequential(linear(), nnx.Linear(6, 6, rngs=rngs))
        self.classifier = nnx.Linear(4, 11, rngs=rngs)
        self.unembed = nnx.Linear(4, 11, rngs=rngs)


@pytest.mark.parametrize("rules", [None, NNX_RULES], ids=["default", "nnx"])
def test_every_layer_of_nnx(rules):
    params = nnx.state(nnx.eval_shape(lambda: NnxLayers(nnx.Rngs(0))), nnx.Param)
    found = decided(params, rules)
    assert found["conv1/kernel"] == ("convolution", (1, 15, 8))
    assert found["my_conv/kernel"] == found["upconv/kernel"] == ("convolution", (1, 27, 8))
    assert found["conv3d/kernel"] == ("convolution", (1, 24, 8))
    for name in ("query", "key", "value", "out"):
        assert found[f"attend/{name}/kernel"] == ("matrix", (1, 8, 8))
    assert found["attend/query_ln/scale"] == found["bn/scale"] == "norm"
    assert found["tokens/embedding"] == ("embedding", (1, 11, 4))
    assert found["classifier/kernel"] == found["unembed/kernel"] == ("head", (1, 4, 11))
    assert found["slope/negative_slope"] == "other"
    others = {path: role for path, role in found.items() if path.endswith("kernel")}
    assert {role[0] for role in others.values()} == {"matrix", "convolution", "head"}
    assert {role for path, role in found.items() if path.endswith("bias")} == {"bias"}


class NnxUnclear(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.patchify = nnx.Conv(3, 8, (4, 4), rngs=rngs)
        self.qkv = nnx.LinearGeneral((16,), (3, 4, 4), rngs=rngs)
        self.split = nnx.LinearGeneral((8,), (2, 4), rngs=rngs)
        self.contract = nnx.Einsum("abc,bcd->ad", (3, 4, 5), (5,), rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)


@pytest.mark.parametrize("rules", [None, NNX_RULES], ids=["default", "nnx"])
@pytest.mark.parametrize("build", [ravine.muon, ravine.shampoo, ravine.soap, ravine.mars])
def test_what_three_axes_mean_is_asked_for(build, rules):
    params = nnx.state(nnx.eval_shape(lambda: NnxUnclear(nnx.Rngs(0))), nnx.Param)
    with pytest.raises(ValueError, match="5 of 12 parameters") as refused:
        build(1e-3, rules=rules).init(params)
    listed = set(re.findall(r"^  (\S+)  +\(", str(refused.value), re.M))
    assert listed == {f"{name}/kernel" for name in ("stem", "patchify", "qkv", "split", "contract")}
    # The suggestion follows from the biases.
    assert "(r'^qkv/kernel$', 'matrix', ravine.MatrixAxes((-4,), (-3, -2, -1)))" in str(
        refused.value
    )


def test_a_refusal_can_be_pasted():
    params = shapes(
        {
            "stages": [{"stem": (3, 3, 3, 8), "odd thing": (8,)} for _ in range(3)],
            "up": {"kernel": (8, 4)},
            "strange": (8, 4),
            "temperature": (),
        }
    )
    with pytest.raises(ValueError, match="8 of 9 parameters") as refused:
        ravine.muon(0.1).init(params)
    message = str(refused.value)
    assert "stages/2/odd thing" in message
    pasted = {}
    exec(message[message.index("rules=") :], {"ravine": ravine}, pasted)
    assert len(pasted["rules"]) == 4 + len(ravine.COMMON_RULES)
    state = jax.eval_shape(ravine.muon(0.1, rules=pasted["rules"]).init, params)
    assert jax.tree.leaves(state)
    found = decided(params, pasted["rules"])
    assert found["stages/1/stem"] == ("matrix", (1, 27, 8))
    assert found["stages/1/odd thing"] == "bias"
    assert found["temperature"] == "other"


def test_what_is_suggested_for_stacked_layers_goes_by_their_biases():
    params = shapes({"stack": {"up": {"kernel": (3, 8, 16), "bias": (3, 16)}}})
    with pytest.raises(ValueError, match="1 of 2 parameters") as refused:
        ravine.muon(0.1).init(params)
    pasted = {}
    message = str(refused.value)
    exec(message[message.index("rules=") :], {"ravine": ravine}, pasted)
    assert decided(params, pasted["rules"])["stack/up/kernel"] == ("matrix", (3, 8, 16))


def test_what_is_suggested_for_stacked_layers_goes_by_their_gains():
    layers = {"gain_1": (3, 8), "gain_2": (3, 8), "wq": (3, 8, 8)}
    params = shapes({"layers": layers, "out": {"mix": (3, 8, 16)}})
    with pytest.raises(ValueError, match="4 of 4 parameters") as refused:
        ravine.muon(0.1).init(params)
    pasted = {}
    message = str(refused.value)
    exec(message[message.index("rules=") :], {"ravine": ravine}, pasted)
    assert decided(params, pasted["rules"]) == {
        "layers/gain_1": "norm",
        "layers/gain_2": "norm",
        "layers/wq": ("matrix", (3, 8, 8)),
        "out/mix": ("matrix", (1, 24, 16)),
    }


# Stacked layers.


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.pre = nnx.LayerNorm(8, rngs=rngs)
        self.mixer = nnx.MultiHeadAttention(2, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.up = nnx.Linear(8, 32, rngs=rngs)


class NnxTrunk(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0)(rngs.split(5))
        self.final = nnx.LayerNorm(8, rngs=rngs)


def test_layers_are_known_by_their_norms():
    params = nnx.state(nnx.eval_shape(lambda: NnxTrunk(nnx.Rngs(0))), nnx.Param)
    found = decided(params)
    assert found["trunk/up/kernel"] == ("matrix", (5, 8, 32))
    assert found["trunk/mixer/query/kernel"] == ("matrix", (5, 8, 8))
    assert found["trunk/conv/kernel"] == ("convolution", (5, 24, 8))
    assert found["trunk/pre/scale"] == found["final/scale"] == "norm"
    # Without a norm, nothing identifies them.
    del params["trunk"]["pre"]
    assert asked(params) == {"trunk/up/kernel"}
    rules = [Rule("trunk/up/kernel$", "matrix", MatrixAxes((-2,), (-1,))), *ravine.COMMON_RULES]
    assert decided(params, rules)["trunk/up/kernel"] == ("matrix", (5, 8, 32))


def test_an_axis_of_layers_in_second_place_is_not_assumed():
    kernels = {"up": {"kernel": (8, 5, 32)}, "down": {"kernel": (32, 5, 8)}}
    params = shapes({"layers": {"norm": {"scale": (8, 5)}, **kernels}})
    assert asked(params) == {"layers/up/kernel", "layers/down/kernel"}


# Everything Flax Linen ships.


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(8))(x, update_stats=False)
        x = nn.WeightNorm(nn.Dense(8))(x)
        cells = (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell)
        for cell in cells:
            x = nn.RNN(cell(8))(x)
        x = nn.Bidirectional(nn.RNN(nn.LSTMCell(8)), nn.RNN(nn.GRUCell(8)))(x)
        x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8)])(x)
        nn.RNN(nn.ConvLSTMCell(3, (3, 3)))(jnp.ones((2, 4, 5, 5, 2)))
        x = nn.MultiHeadDotProductAttention(2, name="self_attention")(x)
        x = nn.MultiHeadAttention(2, name="second")(x)
        x = nn.Conv(8, (5,))(x)
        nn.ConvTranspose(8, (5,))(x)
        nn.ConvLocal(4, (3,))(x)
        for norm in (nn.BatchNorm(use_running_average=True), nn.GroupNorm(2), nn.InstanceNorm()):
            x = norm(x)
        x = nn.PReLU()(nn.RMSNorm()(nn.LayerNorm()(x)))
        nn.Embed(11, 4)(jnp.ones(3, int))
        return nn.Dense(7, name="cls_head")(x)


def test_every_layer_of_linen():
    params = jax.eval_shape(LinenLayers().init, KEY, jnp.ones((2, 6, 8)))["params"]
    found = decided(params)
    for module in ("self_attention", "second"):
        for name in ("query", "key", "value", "out"):
            assert found[f"{module}/{name}/kernel"] == ("matrix", (1, 8, 8))
    assert found["Conv_0/kernel"] == found["ConvTranspose_0/kernel"] == ("convolution", (1, 40, 8))
    assert found["ConvLocal_0/kernel"] == ("matrix", (6, 24, 4))
    assert found["ConvLSTMCell_0/hh/kernel"] == ("convolution", (1, 27, 12))
    assert found["WeightNorm_0/Dense_1/kernel/scale"] == found["RMSNorm_0/scale"] == "norm"
    assert found["cls_head/kernel"] == ("head", (1, 8, 7))
    assert found["PReLU_0/negative_slope"] == "other"


# Equinox and Haiku.


def test_every_layer_of_equinox():
    n = eqx.nn
    modules = {
        "layers": [n.Linear(4, 5, key=KEY), n.Linear(5, 5, key=KEY)],
        "conv": n.Conv2d(3, 8, 5, key=KEY),
        "conv_1": n.Conv1d(3, 8, 5, key=KEY),
        "upconv": n.ConvTranspose2d(3, 8, 5, key=KEY),
        "embed": n.Embedding(11, 4, key=KEY),
        "emb": n.Embedding(11, 4, key=KEY),
        "attention": n.MultiheadAttention(2, 8, use_query_bias=True, key=KEY),
        "gru": n.GRUCell(4, 6, key=KEY),
        "lstm": n.LSTMCell(4, 6, key=KEY),
        "before": n.LayerNorm(4),
        "rms": n.RMSNorm(4),
        "group": n.GroupNorm(2, 4),
        "spectral": n.SpectralNorm(n.Linear(4, 5, key=KEY), "weight", key=KEY),
        "weighted": n.WeightNorm(n.Linear(4, 5, key=KEY), "weight"),
        "mlp": n.MLP(4, 5, 7, 2, key=KEY),
        "slope": n.PReLU(),
        "lm_head": n.Linear(4, 11, key=KEY),
    }
    params = eqx.filter(modules, eqx.is_inexact_array)
    found = decided(params)
    assert found == decided(params, EQUINOX_RULES)
    assert found["layers/0/weight"] == ("matrix", (1, 4, 5))
    assert found["conv/weight"] == found["upconv/weight"] == ("convolution", (1, 75, 8))
    assert found["conv_1/weight"] == ("convolution", (1, 15, 8))
    assert found["embed/weight"] == found["emb/weight"] == ("embedding", (1, 11, 4))
    assert found["attention/query_proj/weight"] == ("matrix", (1, 8, 8))
    assert found["gru/weight_ih"] == ("matrix", (1, 4, 18))
    assert found["before/weight"] == found["rms/weight"] == found["weighted/g"] == "norm"
    assert found["weighted/layer/weight"] == ("matrix", (1, 4, 5))
    assert found["lm_head/weight"] == ("head", (1, 4, 11))
    assert found["conv/bias"] == found["gru/bias_n"] == "bias"


def test_a_table_that_equinox_shares_is_asked_for():
    def shared(*names):
        layers = eqx.nn.Embedding(11, 4, key=KEY), eqx.nn.Linear(4, 11, False, key=KEY)
        nodes = dict(zip(names, layers, strict=True)) if names else layers
        first, last = names or (0, 1)
        return eqx.nn.Shared(nodes, lambda node: node[last].weight, lambda node: node[first].weight)

    rest = {"dense": eqx.nn.Linear(4, 4, key=KEY), "layers": [eqx.nn.Linear(4, 4, key=KEY)]}
    for rules in (None, EQUINOX_RULES):
        params = eqx.filter({"table": shared(), **rest}, eqx.is_array)
        assert asked(params, rules) == {"table/pytree/0/weight"}
        params = eqx.filter({"table": shared("embed", "head"), **rest}, eqx.is_array)
        found = {d.path: d.role for d in decide(params, rules)}
        assert found["table/pytree/embed/weight"] == "embedding"
        assert found["dense/weight"] == found["layers/0/weight"] == "matrix"


def test_what_is_suggested_for_equinox_is_right():
    """Outputs come first, also behind the axis of stacked layers."""
    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 5, key=key))
    modules = {
        "stem": eqx.nn.Conv2d(3, 8, 4, key=KEY),
        "bare": eqx.nn.Conv1d(3, 8, 4, use_bias=False, key=KEY),
        "trunk": stacked(jax.random.split(KEY, 3)),
    }
    with pytest.raises(ValueError, match="3 of 5 parameters") as refused:
        ravine.muon(1e-3).init(eqx.filter(modules, eqx.is_array))
    for name, axes in (
        ("stem", "(-3, -2, -1), (-4,)"),
        ("bare", "(-2, -1), (-3,)"),
        ("trunk", "(-1,), (-2,)"),
    ):
        rule = f"(r'^{name}/weight$', 'matrix', ravine.MatrixAxes({axes}))"
        assert rule in str(refused.value)


def haiku_layers(x):
    y = hk.LayerNorm(-1, True, True)(hk.Conv1D(8, 3)(hk.Linear(8)(x)))
    y = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(y, y, y)
    image = jnp.ones((1, 6, 6, 2))
    hk.Conv2DTranspose(5, 3)(hk.Conv2D(3, 3)(image))
    hk.GroupNorm(2)(hk.InstanceNorm(True, True)(image))
    hk.Conv3D(3, 3)(jnp.ones((1, 6, 6, 6, 2)))
    hk.LSTM(5)(x[:, 0], hk.LSTM(5).initial_state(2))
    hk.GRU(5)(x[:, 0], jnp.ones((2, 5)))
    hk.VanillaRNN(5)(x[:, 0], jnp.ones((2, 5)))
    hk.nets.MLP([3, 4])(x)
    hk.Embed(11, 4)(jnp.ones(2, int))
    hk.Embed(11, 4, name="emb")(jnp.ones(2, int))
    hk.Linear(11, name="logits")(hk.RMSNorm(-1)(hk.Bias()(y)))


def test_layers_of_haiku():
    transformed = hk.transform_with_state(haiku_layers)
    params, _ = jax.eval_shape(transformed.init, KEY, jnp.ones((2, 6, 8)))
    found = decided(params)
    assert found == decided(params, HAIKU_RULES)
    assert found["linear/w"] == found["multi_head_attention/query/w"] == ("matrix", (1, 8, 8))
    assert found["mlp/~/linear_0/w"] == ("matrix", (1, 8, 3))
    assert found["conv1_d/w"] == ("convolution", (1, 24, 8))
    assert found["conv2_d/w"] == ("convolution", (1, 18, 3))
    assert found["conv2_d_transpose/w"] == ("convolution", (1, 27, 5))
    assert found["conv3_d/w"] == ("convolution", (1, 54, 3))
    assert found["gru/w_h"] == ("matrix", (1, 5, 15))
    assert found["embed/embeddings"] == ("embedding", (1, 11, 4))
    assert found["logits/w"] == ("head", (1, 8, 11))
    assert found["layer_norm/offset"] == found["linear/b"] == "bias"
    assert found["layer_norm/scale"] == found["instance_norm/scale"] == "norm"


# Names from other projects, by shape: plain JAX, mixtures of experts, public models, Hugging Face.

LORA = {"": (4, 8), "_lora_a": (4, 2), "_lora_b": (2, 8)}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (
            {"w1": (4, 8), "b1": (8,), "W2": (8, 2), "b2": (2,)},
            {
                "w1": ("matrix", (1, 4, 8)),
                "b1": "bias",
                "W2": ("matrix", (1, 8, 2)),
                "b2": "bias",
            },
        ),
        (
            [[(4, 8), (8,)], [(8, 2), (2,)]],
            {
                "0/0": ("matrix", (1, 4, 8)),
                "0/1": "bias",
                "1/0": ("matrix", (1, 8, 2)),
                "1/1": "bias",
            },
        ),
        (
            {
                "wte": (11, 4),
                "emb": (11, 4),
                "blocks": [{"ln1": (4,), "wq": (4, 4), "w_out": (4, 4)}],
                "lm_head": (4, 11),
            },
            {
                "wte": ("embedding", (1, 11, 4)),
                "emb": ("embedding", (1, 11, 4)),
                "blocks/0/ln1": "norm",
                "blocks/0/wq": ("matrix", (1, 4, 4)),
                "blocks/0/w_out": ("matrix", (1, 4, 4)),
                "lm_head": ("head", (1, 4, 11)),
            },
        ),
        (
            {
                "moe": {"router": {"kernel": (4, 6)}, "wi": (6, 4, 8), "wo": (6, 8, 4)},
                "experts": {"up": {"kernel": (6, 4, 8)}, "w1": (6, 4, 8), "down_proj": (6, 8, 4)},
                "list": {"experts": [{"kernel": (4, 8)}]},
                "ffn": {"wi": {"kernel": (4, 8)}},
            },
            {
                "moe/router/kernel": "router",
                "moe/wi": ("matrix", (6, 4, 8)),
                "moe/wo": ("matrix", (6, 8, 4)),
                "experts/up/kernel": ("matrix", (6, 4, 8)),
                "experts/w1": ("matrix", (6, 4, 8)),
                "experts/down_proj": ("matrix", (6, 8, 4)),
                "list/experts/0/kernel": ("matrix", (1, 4, 8)),
                "ffn/wi/kernel": ("matrix", (1, 4, 8)),
            },
        ),
        (
            {
                "embed": {"W": (11, 4)},
                "pos_embed": {"W_pos": (5, 4)},
                "up": {"W": (4, 8), "b": (8,)},
                "head": {"W": (4, 11)},
                "unembed": {"W": (4, 11)},
            },
            {
                "embed/W": ("embedding", (1, 11, 4)),
                "pos_embed/W_pos": ("embedding", (1, 5, 4)),
                "up/W": ("matrix", (1, 4, 8)),
                "up/b": "bias",
                "head/W": ("head", (1, 4, 11)),
                "unembed/W": ("head", (1, 4, 11)),
            },
        ),
        (
            {
                **dict.fromkeys(("W_E", "W_embed", "w_emb", "Wemb", "w_pos"), (11, 4)),
                **dict.fromkeys(("W_U", "W_unembed", "w_out_head"), (4, 11)),
                "W_O": (4, 4),
            },
            {
                **dict.fromkeys(
                    ("W_E", "W_embed", "w_emb", "Wemb", "w_pos"), ("embedding", (1, 11, 4))
                ),
                **dict.fromkeys(("W_U", "W_unembed", "w_out_head"), ("head", (1, 4, 11))),
                "W_O": ("matrix", (1, 4, 4)),
            },
        ),
        (
            {
                "linear": {"kernel": (4, 8), "kernel_lora_a": (4, 2), "kernel_lora_b": (2, 8)},
                "einsum": {"w": (4, 8), "w_lora_a": (4, 2), "w_lora_b": (2, 8)},
            },
            {
                **{f"linear/kernel{end}": ("matrix", (1, *shape)) for end, shape in LORA.items()},
                **{f"einsum/w{end}": ("matrix", (1, *shape)) for end, shape in LORA.items()},
            },
        ),
        (
            {
                "embed_proj": {"w": (12, 4)},
                "embedding_projection": {"weight": (4, 12)},
                "label_emb": {"weight": (11, 4)},
                "norm_proj": {"weight": (8, 4)},
                "lnet": {"w": (4, 8)},
                "pre_norm": {"weight": (4,)},
            },
            {
                "embed_proj/w": ("matrix", (1, 12, 4)),
                "embedding_projection/weight": ("matrix", (1, 12, 4)),
                "label_emb/weight": ("embedding", (1, 11, 4)),
                "norm_proj/weight": ("matrix", (1, 4, 8)),
                "lnet/w": ("matrix", (1, 4, 8)),
                "pre_norm/weight": "norm",
            },
        ),
    ],
    ids=["w1_b1", "pairs", "gpt", "experts", "W", "W_E", "lora", "projections"],
)
def test_names_of_plain_jax(params, expected):
    assert decided(shapes(params)) == expected


@pytest.mark.parametrize("stack", [(), (3,)], ids=["layers", "stacked"])
def test_norms_called_kernel_as_in_easylm_and_easydel(stack):
    block = {
        "attention": {name: {"kernel": (*stack, 4, 4)} for name in ("wq", "wk", "wv", "wo")},
        "feed_forward": {"w1": {"kernel": (*stack, 4, 8)}},
        "attention_norm": {"kernel": (*stack, 4)},
        "input_layernorm": {"kernel": (*stack, 4)},
        "key_normalization": {"kernel": (*stack, 2)},
        "q_norm": {"kernel": (*stack, 2)},
    }
    found = decided(shapes({"h": block, "ln_f": {"kernel": (4,)}, "norm": {"kernel": (4,)}}))
    batch = stack[0] if stack else 1
    assert found["h/attention/wq/kernel"] == ("matrix", (batch, 4, 4))
    assert found["h/feed_forward/w1/kernel"] == ("matrix", (batch, 4, 8))
    assert found["h/attention_norm/kernel"] == found["h/input_layernorm/kernel"] == "norm"
    assert found["h/q_norm/kernel"] == found["h/key_normalization/kernel"] == "norm"
    assert found["ln_f/kernel"] == found["norm/kernel"] == "norm"


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        # Tunix; nanodo.
        (("q_proj", "k_proj", "v_proj", "o_proj"), "w"),
        (("query", "key", "value", "attn_out_proj"), "kernel"),
    ],
)
def test_attention_of_public_models(attention, name):
    *inputs, output = attention
    params = {module: {name: (8, 2, 4)} for module in inputs} | {output: {name: (2, 4, 8)}}
    found = decided(shapes({"attn": params}))
    assert found == {f"attn/{module}/{name}": ("matrix", (1, 8, 8)) for module in attention}


@pytest.mark.parametrize(
    "norms",
    [
        ("attn_norm", "ffn_norm"),
        ("ln1", "ln_2"),
        ("ln1_g", "ln1_b"),
        ("rms_att_weight", "rms_ffn_weight"),
        ("attention_norm_scale", "mlp_norm_scale"),
    ],
)
def test_norms_without_a_module_reveal_stacked_layers_too(norms):
    layers = {**dict.fromkeys(norms, (3, 8)), "wq": (3, 8, 8), "w_up": (3, 8, 16)}
    found = decided(shapes({"layers": layers, "wte": (11, 8), "final_norm": (8,)}))
    assert found == {
        **{f"layers/{name}": "norm" for name in norms},
        "layers/wq": ("matrix", (3, 8, 8)),
        "layers/w_up": ("matrix", (3, 8, 16)),
        "wte": ("embedding", (1, 11, 8)),
        "final_norm": "norm",
    }


def test_words_are_no_weights():
    assert asked(shapes({"words": (11, 4), "word": (11, 4), "wo": (4, 4)})) == {"words", "word"}


def test_only_pairs_of_a_matrix_and_a_bias_are_known_by_their_places():
    table, pairs = [(11, 4)], [[(4, 8), (8,)], [(8, 2), (2,)]]
    # An embedding in a list of layers, or in a node without names of its children.
    assert asked(shapes([table, *pairs])) == {"0/0", "1/0", "2/0"}
    assert decided(shapes([[], *pairs]))["1/0"] == ("matrix", (1, 4, 8))
    # All without a bias, as in a part of the parameters.
    assert decided(shapes([pair[:1] for pair in pairs]))["1/0"] == ("matrix", (1, 8, 2))


def test_a_gate_beside_experts_routes():
    def layer(router, experts):
        kernels = {name: {"kernel": (6, 4, 8)} for name in ("gate_proj", "up_proj")}
        return {"mlp": {router: {"kernel": (4, 6)}, experts: kernels, "down_proj": (6, 8, 4)}}

    shared = {"shared_expert_gate": {"kernel": (4, 1)}}
    found = decided(shapes({"0": layer("gate", "experts"), "1": shared}))
    assert found == {
        "0/mlp/gate/kernel": "router",
        "0/mlp/experts/gate_proj/kernel": ("matrix", (6, 4, 8)),
        "0/mlp/experts/up_proj/kernel": ("matrix", (6, 4, 8)),
        "0/mlp/down_proj": ("matrix", (6, 8, 4)),
        "1/shared_expert_gate/kernel": "router",
    }
    # Without experts, or with its own `up`, it is half of a gated feed-forward layer.
    dense = {name: {"kernel": (4, 8)} for name in ("gate", "up")}
    for params in ({"mlp": dense}, {"mlp": dense | {"experts": {"w1": (6, 4, 8)}}}):
        assert decided(shapes(params))["mlp/gate/kernel"] == ("matrix", (1, 4, 8))


def test_patches_are_convolutions_in_every_library_and_no_embeddings():
    params = {
        "patch_embed": {"proj": {"weight": (8, 3, 4, 4)}},
        "patch_embedder": {"weight": (8, 3, 4, 4)},
        "patch_embedding": {"kernel": (4, 4, 3, 8)},
        "patch_embed_1": {"w": (4, 4, 3, 8)},
    }
    assert set(decided(shapes(params)).values()) == {("convolution", (1, 48, 8))}
    flat = {"patch_embed": {"weight": (8, 48)}, "patch_embedding": {"w": (48, 8)}}
    assert set(decided(shapes(flat)).values()) == {("matrix", (1, 48, 8))}


def test_what_comes_before_the_logits_is_no_head():
    params = {"pre_logits": {"kernel": (8, 8)}, "logits": {"kernel": (8, 11)}}
    assert decided(shapes(params)) == {
        "pre_logits/kernel": ("matrix", (1, 8, 8)),
        "logits/kernel": ("head", (1, 8, 11)),
    }


def test_b_beside_a_is_no_bias_if_they_multiply():
    adapter = {"a": (8, 2), "b": (2, 6)}
    assert asked(shapes({"adapter": adapter})) == {"adapter/a", "adapter/b"}
    assert asked(shapes(adapter)) == {"a", "b"}
    # A bias is still recognized, also in stacked layers.
    layer = {"w": (3, 8, 6), "b": (3, 6), "scale": (3, 6)}
    assert decided(
        shapes({"adapter": {"a": (8, 2), "w": (8, 2), "b": (2,)}, "trunk": layer}),
        [("a$", "other"), *ravine.COMMON_RULES],
    ) == {
        "adapter/a": "other",
        "adapter/b": "bias",
        "adapter/w": ("matrix", (1, 8, 2)),
        "trunk/b": "bias",
        "trunk/scale": "norm",
        "trunk/w": ("matrix", (3, 8, 6)),
    }


def test_hugging_face():
    params = shapes(
        {
            "transformer": {
                "wte": {"embedding": (11, 4)},
                "h": {
                    "0": {
                        "ln_1": {"scale": (4,), "bias": (4,)},
                        "attn": {"c_attn": {"kernel": (12, 4)}, "c_proj": {"kernel": (4, 4)}},
                        "mlp": {"c_fc": {"kernel": (16, 4)}, "c_proj": {"kernel": (4, 16)}},
                    }
                },
            },
            "bert": {
                "encoder": {"layer": {"0": {"attention": {"self": {"query": {"kernel": (4, 4)}}}}}},
                "embeddings": {
                    "LayerNorm": {"scale": (4,)},
                    "word_embeddings": {"embedding": (11, 4)},
                },
                "pooler": {"dense": {"kernel": (4, 4)}},
            },
            "vit": {
                "embeddings": {
                    "cls_token": (1, 1, 4),
                    "position_embeddings": (1, 5, 4),
                    "patch_embeddings": {"projection": {"kernel": (2, 2, 3, 4)}},
                }
            },
            "t5": {"layer_norm": {"weight": (4,)}, "SelfAttention": {"q": {"kernel": (4, 6)}}},
            "classifier": {"kernel": (4, 2)},
            "qa_outputs": {"kernel": (4, 2)},
        }
    )
    found = decided(params, HUGGING_FACE_RULES)
    block = "transformer/h/0"
    assert found[f"{block}/attn/c_attn/kernel"] == ("matrix", (3, 4, 4))
    assert found[f"{block}/mlp/c_fc/kernel"] == ("matrix", (1, 4, 16))
    assert found["vit/embeddings/patch_embeddings/projection/kernel"] == ("convolution", (1, 12, 4))
    assert found["vit/embeddings/cls_token"] == "other"
    assert found["vit/embeddings/position_embeddings"] == ("embedding", (1, 5, 4))
    assert found["t5/layer_norm/weight"] == found["bert/embeddings/LayerNorm/scale"] == "norm"
    assert found["classifier/kernel"][0] == found["qa_outputs/kernel"][0] == "head"
    assert decided(params).keys() == found.keys()


# Arguments that are refused where they are passed.


@pytest.mark.parametrize("build", [ravine.muon, ravine.normuon, ravine.shampoo, ravine.soap])
def test_misspelt_roles_are_refused(build):
    with pytest.raises(ValueError, match=r"'kernel\$' has 'martix'.*did you mean matrix"):
        build(0.1, rules=[("kernel$", "martix")])
    with pytest.raises(ValueError, match=r"roles of \w+ has 'martix'.*did you mean matrix"):
        build(0.1, roles=("martix",))
    with pytest.raises(ValueError, match="not a regular expression"):
        build(0.1, rules=[("kernel(", "matrix")])
    with pytest.raises(
        ValueError, match="mask_by_role has 'martix', which is no role; did you mean matrix"
    ):
        ravine.optimizers.roles.mask_by_role(["martix"])


def test_a_matrix_optimizer_without_matrices_is_refused_but_not_in_a_part():
    params = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="muon gets no parameter: none has the role matrix"):
        ravine.muon(0.1).init({"bias": jnp.ones(3)})
    masked = optax.masked(ravine.muon(0.1), {"bias": True, "kernel": False})
    state = masked.init(params)
    masked.update(params, state, params)
    tx = optax.partition(
        {"m": ravine.muon(0.1), "s": ravine.sgd(0.1)}, {"bias": "m", "kernel": "s"}
    )
    state = tx.init(params)
    tx.update(params, state, params)
    optax.tree.map_params(tx, lambda x: x, state)


def test_one_default_everywhere():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))

    params = jax.eval_shape(Mlp().init, KEY, jnp.ones((1, 4)))["params"]
    assert "Dense_0/kernel" in role_table(params)
    mask = ravine.optimizers.roles.mask_by_role(["matrix"])(params)
    assert jax.tree.leaves(mask) == [False, True, False, True]
    assert ravine.optimizers.roles.axes_of_path("Dense_0/kernel") == MatrixAxes((-2,), (-1,))
    found = ravine.optimizers.roles.layouts(params)
    assert found["Dense_0"]["kernel"].pieces == ((1, 8, 2),)


def test_signatures_are_short():
    for name in ravine.names():
        signature = inspect.signature(getattr(ravine, name))
        defaults = {k: repr(p.default) for k, p in signature.parameters.items()}
        assert max(map(len, defaults.values())) < 60, name
        assert defaults.get("rules", "None") == "None", name


def test_the_page_on_roles_shows_the_refusal_that_is_printed():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "roles.md").read_text(encoding="utf-8")
    params = shapes({"qkv": {"kernel": (16, 3, 4, 4), "bias": (3, 4, 4)}})
    with pytest.raises(ValueError) as refused:
        ravine.shampoo(3e-3).init(params)
    assert str(refused.value).partition("parameters")[2] in page
