"""Rules for MaxText's names: dense, latent-attention and mixture-of-experts layers, scanned or not."""

import jax
import pytest
from ravine.optimizers.matrix.shape.layout import MatrixAxes
from ravine.optimizers.roles import MAXTEXT_RULES, Rule, assign_roles, layouts

from .decided import decided, shapes


def maxtext(layers: tuple[int, ...]) -> dict:
    """Names and shapes in MaxText's decoders: a dense, an MLA and a mixture-of-experts layer."""
    d, heads, width, hidden, experts = 16, 4, 8, 24, 6

    def scanned(first, *rest):
        return {"kernel": (first, *layers, *rest)}

    norm = {"scale": (d, *layers)}
    attention = {
        "query": scanned(d, heads, width),
        "key": scanned(d, 2, width),
        "value": {**scanned(d, 2, width), "bias": (2, *layers, width)},
        "out": scanned(heads, width, d),
        "query_norm": {"scale": (width, *layers)},
        "sinks": (heads, *layers),
    }
    mla = {
        "wq_a": scanned(d, 10),
        "q_norm": {"scale": (10, *layers)},
        "wq_b": scanned(10, heads, 12),
        "wkv_a": scanned(d, 14),
        "kv_norm": {"scale": (10, *layers)},
        "wkv_b": scanned(10, heads, 16),
        "out": scanned(heads, width, d),
    }
    mlp = {"wi_0": scanned(d, hidden), "wi_1": scanned(d, hidden), "wo": scanned(hidden, d)}
    experts_in, experts_out = (experts, *layers, d, hidden), (experts, *layers, hidden, d)
    moe = {
        "gate": {**scanned(d, experts), "bias": (experts, *layers)},
        "wi_0": experts_in,
        "wi_1": experts_in,
        "wo": experts_out,
    }
    dense_layer = {
        "pre_self_attention_layer_norm": norm,
        "post_self_attention_layer_norm": norm,
        "self_attention": attention,
        "mlp": mlp,
    }
    moe_layer = {
        "pre_self_attention_layer_norm": norm,
        "self_attention": mla,
        "DeepSeekMoeBlock_0": {"MoeBlock_0": moe, "shared_experts": mlp},
    }
    fused = {"mlp": {"wi": scanned(d, 2, hidden)}}
    decoder = {
        "layers": dense_layer,
        "moe_layers": moe_layer,
        "fused_layers": fused,
        "decoder_norm": {"scale": (d,)},
        "logits_dense": {"kernel": (d, 32)},
    }
    return shapes({"params": {"token_embedder": {"embedding": (32, d)}, "decoder": decoder}})


@pytest.mark.parametrize("layers", [(3,), ()], ids=["scanned", "unscanned"])
def test_maxtext(layers):
    prefix = "params/decoder/"
    found = {
        path.removeprefix(prefix): value
        for path, value in decided(maxtext(layers), MAXTEXT_RULES).items()
    }
    L = layers[0] if layers else 1
    attention, mla = "layers/self_attention", "moe_layers/self_attention"
    moe, shared = (
        f"moe_layers/DeepSeekMoeBlock_0/{name}" for name in ("MoeBlock_0", "shared_experts")
    )
    expected = {
        f"{attention}/query/kernel": (L, 16, 32),
        f"{attention}/key/kernel": (L, 16, 16),
        f"{attention}/value/kernel": (L, 16, 16),
        f"{attention}/out/kernel": (L, 32, 16),
        f"{mla}/wq_a/kernel": (L, 16, 10),
        f"{mla}/wq_b/kernel": (L, 10, 48),
        f"{mla}/wkv_a/kernel": (L, 16, 14),
        f"{mla}/wkv_b/kernel": (L, 10, 64),
        f"{mla}/out/kernel": (L, 32, 16),
        f"{moe}/wi_0": (6 * L, 16, 24),
        f"{moe}/wi_1": (6 * L, 16, 24),
        f"{moe}/wo": (6 * L, 24, 16),
        "fused_layers/mlp/wi/kernel": (2 * L, 16, 24),
    }
    for mlp in ("layers/mlp", shared):
        expected[f"{mlp}/wi_0/kernel"] = expected[f"{mlp}/wi_1/kernel"] = (L, 16, 24)
        expected[f"{mlp}/wo/kernel"] = (L, 24, 16)
    matrices = {path: pieces for path, (role, pieces) in found.items() if role == "matrix"}
    assert matrices == {path: (piece,) for path, piece in expected.items()}
    others = {path: role for path, (role, _) in found.items() if role != "matrix"}
    assert others["params/token_embedder/embedding"] == "embedding"
    assert others["logits_dense/kernel"] == "head"
    assert others[f"{moe}/gate/kernel"] == "router"
    assert others[f"{moe}/gate/bias"] == others[f"{attention}/sinks"] == "bias"
    assert {role for path, role in others.items() if path.endswith("scale")} == {"norm"}


def test_a_fused_projection_in_maxtext_needs_the_numbers_of_heads():
    params = shapes({"self_attention": {"qkv_proj": {"kernel": (16, 3, 8, 4)}}})
    with pytest.raises(
        ValueError,
        match=r"match no role rule[\s\S]*\n  self_attention/qkv_proj/kernel  \(16, 3, 8, 4\)",
    ):
        assign_roles(params, MAXTEXT_RULES)
    axes = MatrixAxes((0,), (-2, -1), column_parts=(16, 8, 8))  # 4 heads, 2 key-value heads
    (found,) = jax.tree.leaves(layouts(params, [Rule("qkv_proj/kernel$", "matrix", axes)]))
    assert found.pieces == ((3, 16, 16), (3, 16, 8), (3, 16, 8))
