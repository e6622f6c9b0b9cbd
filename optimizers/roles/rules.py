"""Rules: what a path says about a parameter, and ready sets of rules for the libraries people use.

A rule decides a parameter by its path, and, where names are not enough, by the number of its axes or by
its neighbours. It never guesses what three or more axes mean: those of a convolution, of Flax's
attention and of stacked experts are known; for all others the error asks for the axes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from ..matrix.shape.layout import MatrixAxes

Role = Literal["embedding", "head", "matrix", "norm", "bias", "router", "convolution", "other"]
MATRIX_ROLES: tuple[Role, ...] = ("matrix", "convolution")

Shapes = Mapping[str, tuple[int, ...]]
"""Paths below a module, such as ``query/kernel``, and their shapes."""


class Rule(NamedTuple):
    """What the parameters are that have a path matching a regular expression.

    Example:
      >>> import ravine
      >>> rules = [ravine.Rule("^final/kernel$", "head"), *ravine.COMMON_RULES]  # the first decides
    """

    pattern: str
    """A regular expression, searched in the path (`re.search`)."""
    role: Role
    axes: MatrixAxes | None = None
    """Rows and columns. None: `[in, out]` for matrices and `[*window, in, out]` for convolutions,
    after axes of stacked layers; a matrix with more axes than that is refused."""
    required: bool = True
    """Raise if it decides no parameter: it is misspelt, or an earlier rule takes them all."""
    ndim: int | None = None
    """Decide only parameters with this many axes, without those of stacked layers."""
    where: Callable[[Shapes], bool] | None = None
    """Decide only if this holds for all shapes in the module two levels above the parameter."""


Rules = Sequence[Rule | tuple[str, Role] | tuple[str, Role, MatrixAxes | None]]

IN_OUT = MatrixAxes((-2,), (-1,))
"""`[..., in, out]`: all axes in front are a batch of matrices."""
OUT_IN = MatrixAxes((-1,), (-2,))
"""`[..., out, in]`: Equinox and PyTorch."""
CONVOLUTION = MatrixAxes((-4, -3, -2), (-1,))
"""`[..., height, width, in, out]`: Flax and Haiku. A depthwise convolution is not a matrix; give it
another role."""
ATTENTION_IN = MatrixAxes((-3,), (-2, -1))
"""`[..., in, heads, head width]`: Flax's query, key and value. ``column_parts=heads``, set with
`dataclasses.replace`, makes each head its own matrix."""
ATTENTION_OUT = MatrixAxes((-3, -2), (-1,))
"""`[..., heads, head width, out]`: Flax's output projection."""


def window(ndim: int) -> MatrixAxes:
    """Axes of a convolution `[*window, in, out]` with this many axes in all."""
    return MatrixAxes(tuple(range(-ndim, -1)), (-1,))


def _maybe(pattern: str, role: Role, axes: MatrixAxes | None = None, **when: object) -> Rule:
    return Rule(pattern, role, axes, required=False, **when)  # type: ignore[arg-type]


_INPUTS = (
    *("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv"),
    *("to_q", "to_k", "to_v"),
)
_OUTPUTS = ("out", "output", "o", "o_proj", "out_proj", "attn_out_proj", "to_out", "wo", "proj")


def _has_heads(shapes: Shapes) -> bool:
    """Whether an output projection has the same heads as a query."""
    kernels = lambda names: [
        shapes.get(f"{name}/{kernel}", ()) for name in names for kernel in ("kernel", "w")
    ]
    makes, takes = kernels(_INPUTS), kernels(_OUTPUTS)
    return any(
        len(i) > 2
        and i[-2:] == o[-3:-1]
        and i[:-3] == o[:-3]
        # With heads, inputs and width all equal, it could also be stacked `[layers, in, out]`.
        and len({*i[-3:]}) > 1
        for i in makes
        for o in takes
    )


def _is_ravine(shapes: Shapes) -> bool:
    """Whether this is a stacked module of Ravine's model."""
    return any(len(shapes.get(f"{name}/kernel", ())) == 3 for name in ("output", "down"))


def _has_no_pair(shapes: Shapes) -> bool:
    """Whether no ``b`` is the second factor of a product with the ``a`` beside it (LoRA)."""
    seconds = {path: shape for path, shape in shapes.items() if re.fullmatch("([^/]*/)?b", path)}
    firsts = [shapes.get(f"{path[:-1]}a", ()) for path in seconds]
    pairs = zip(firsts, seconds.values(), strict=True)
    return not any(len(a) == len(b) > 1 and a[-1] == b[-2] for a, b in pairs)


def _has_experts(shapes: Shapes) -> bool:
    """Whether there are experts, and no ``up`` that the ``gate`` beside them could gate."""
    modules = {path.partition("/")[0] for path in shapes}
    return "up" not in modules and any("experts" in module for module in modules)


def _are_pairs(shapes: Shapes) -> bool:
    """Whether all layers have a second parameter, or none has; a lone first one could be a table."""
    firsts = [path for path in shapes if re.fullmatch(r"\d+/0", path)]
    have = [f"{path[:-1]}1" in shapes for path in firsts]
    return all(have) or not any(have)


_HEAD = (
    r"(^|/)(?!\w*(multi|attention|per)_?head|pre_logits)((\w+_)?head|(\w+_)?logits(_dense)?"
    r"|(\w+_)?classifier|([wW]_)?unembed(ding|der)?|embed_out|qa_outputs)"
)
_NORM = (
    r"(^|/)([^/]*[nN]orm(?![^/]*([pP]roj|[dD]ense|[lL]inear))[^/]*|ln(_[^/]*|\d[^/]*|f)?"
    r"|[^/]*_ln(_[^/]*)?)"
)
_TABLE = r"(tok|token|pos|position|word|char|label|class|type|segment)_emb"
# A projection to the width of an embedding, and one of patches, are no tables.
_EMBED = rf"(^|/)(?![^/]*([pP]roj|[pP]atch))([^/]*[eE]mbed[^/]*|wte|wpe|emb|{_TABLE}[^/]*)"
# Layers without names in Equinox's `Shared`: which of them is the embedding is asked for.
_SHARED = r"(.*/)?pytree/\d+/weight$"
_PATCHES = r"patch_embed\w*(/proj(ection)?)?"
_WINDOWS = (3, 4, 5)

_NAMED = (
    _maybe(rf"{_HEAD}(/(kernel|[wW]))?$|(^|/)W_U$", "head"),
    _maybe(rf"{_HEAD}/weight$", "head", OUT_IN),
    _maybe(r"(^|/)(cls|cls_token|class_token|class_embedding|mask_token|dist\w*_token)$", "other"),
    _maybe(r"(^|/)negative_slope$", "other"),
    _maybe(r"(^|/)pos\w*_?emb\w*$", "embedding", IN_OUT, ndim=3),  # [1, positions, width]
    _maybe(
        rf"embedd?ings?$|(^|/)(wte|wpe|embed|emb|{_TABLE}\w*|[wW]_?emb\w*|[wW]_pos|W_E)$",
        "embedding",
    ),
    _maybe(r"(^|[/_])scale$", "norm"),
    _maybe(rf"{_NORM}/(weight|gamma|gain|w|g)$", "norm"),
    # EasyLM, EasyDeL
    _maybe(r"(^|/)(\w*[nN]orm(alization)?(_?\d+)?|ln_?(\d+|f))/kernel$", "norm"),
    _maybe(rf"{_NORM}$", "norm", ndim=1),
    # Those of stacked layers have two axes.
    _maybe(
        r"(^|/)(\w*[nN]orm(_?\d+)?|ln(_?(\d+|f))?|\w+_ln|rms(_\w+|\d+)?)"
        r"(_(b|g|w|gain|gamma|scale|weight))?$",
        "norm",
    ),
    _maybe(r"(^|[/_])bias(_\w+)?$|(^|/)(b\d+|b_\w+|offset|beta)$", "bias"),
    _maybe(r"(^|/)b$", "bias", ndim=1),
    _maybe(r"(^|/)b$", "bias", where=_has_no_pair),
    _maybe(r"(^|[/_])router(/(kernel|weight|w))?$", "router"),
    _maybe(r"(^|/)[^/]*[mM][oO][eE][^/]*/gate(/(kernel|weight|w))?$", "router"),
    _maybe(r"(^|/)gate/(kernel|weight|w)$", "router", where=_has_experts),
    _maybe(r"(^|/)shared_experts?_gate/(kernel|weight|w)$", "router"),
)

_FLAX = (
    # Ravine's own model and published shapes: [layers, in, out], [layers, experts, in, out].
    _maybe(
        r"(^|/)layers/((cross_)?attention/(query|key|value|output|(query|key_value)_[ab])"
        r"|(feed_forward|shared_expert)/(gate|up|down))/kernel$",
        "matrix",
        IN_OUT,
        where=_is_ravine,
    ),
    _maybe(r"(^|/)layers/experts/(gate|up|down)/kernel$", "matrix", IN_OUT, ndim=4),
    # Stacked or not: their shapes decide.
    *(
        _maybe(rf"(^|/)({'|'.join(names)})/(kernel|w)$", "matrix", axes, ndim=n, where=_has_heads)
        for names, axes in ((_INPUTS, ATTENTION_IN), (_OUTPUTS, ATTENTION_OUT))
        for n in (3, 4)
    ),
    _maybe(r"(^|/)ConvLocal_\d+/kernel$", "matrix", IN_OUT),  # [*positions, window x in, out]
    *(
        _maybe(
            r"(^|/)([^/]*[cC]onv(?!Local|LSTM)[^/]*|ConvLSTMCell_\d+/(ih|hh)"
            rf"|{_PATCHES})/kernel$",
            "convolution",
            window(n),
            ndim=n,
        )
        for n in _WINDOWS
    ),
)

_EXPERTS = (
    # [experts, in, out], whether the kernels are the modules' or the layer's own.
    _maybe(
        r"(^|/)[^/]*([eE]xperts|[mM][oO][eE])[^/]*/(?!\d)(.*/)?(kernel|[wW]\w*|\w+_proj)$(?<!weight)",
        "matrix",
        IN_OUT,
        ndim=3,
    ),
    _maybe(r"(^|/)[^/]*[eE]xperts[^/]*/(?!\d)(.*/)?weight$", "matrix", OUT_IN, ndim=3),
    _maybe(r"(^|/)(wi|wo|wi_\d|(gate|up|down)_proj)$", "matrix", IN_OUT, ndim=3),
)

_EQUINOX = (
    _maybe(r"(^|/)\w+_index/init/\d+$", "other"),  # Equinox's state, not a parameter
    _maybe(r"(^|/)g$", "norm"),  # WeightNorm
    _maybe(rf"{_EMBED}/weight$", "embedding"),
    *(
        _maybe(
            rf"(^|/)([^/]*[cC]onv[^/]*|{_PATCHES})/weight$",
            "convolution",
            MatrixAxes(tuple(range(1 - n, 0)), (-n,)),
            ndim=n,
        )
        for n in _WINDOWS
    ),
    _maybe(r"(^|/)weight$", "norm", ndim=1),
    _maybe(rf"^(?!{_SHARED})(.*/)?weight(_ih|_hh)?$", "matrix", OUT_IN, ndim=2),
)

_HAIKU = (
    _maybe(rf"{_EMBED}/([wW]|embeddings)$", "embedding"),
    _maybe(
        r"(^|/)[^/]*conv2_d_transpose[^/]*/w$",
        "convolution",
        MatrixAxes((-4, -3, -1), (-2,)),
        ndim=4,
    ),
    *(
        _maybe(
            rf"(^|/)([^/]*conv(?!\w*transpose)\w*(/(input|hidden)_to_hidden)?|{_PATCHES})/w$",
            "convolution",
            window(n),
            ndim=n,
        )
        for n in _WINDOWS
    ),
)

_PLAIN = (
    # `[(w, b), ...]`
    _maybe(r"(^|/)\d+/0$", "matrix", ndim=2, where=_are_pairs),
    _maybe(r"(^|/)\d+/1$", "bias", ndim=1),
    _maybe(
        rf"^(?!{_SHARED})(.*/)?(?!words?$)(kernel|(\w+_)?lora_[ab]|[wW]\d*|[wW]_?[a-zA-Z]{{1,8}}(_?\d)?)$",
        "matrix",
    ),
)

RAVINE_RULES: Rules = (
    Rule(r"(^|/)embed/embedding$", "embedding"),
    Rule(r"(^|/)head/kernel$", "head"),
    Rule(r"norm/scale$", "norm"),
    Rule(r"/bias$", "bias", required=False),
    Rule(r"/kernel$", "matrix", IN_OUT),
)
"""Rules for the model of ``ravine.training``."""

COMMON_RULES: Rules = (*_NAMED, *_FLAX, *_EXPERTS, *_EQUINOX, *_HAIKU, *_PLAIN)
"""The default: parameter names of Flax NNX, Linen, Equinox, Haiku and plain JAX, and of EasyLM, EasyDeL,
nanodo and T5X.

Heads are recognised by names such as ``head``, ``lm_head``, ``logits``, ``classifier``, ``unembed``;
one called ``Dense_7`` needs a rule in front, or it is a matrix. A convolution has ``conv`` or
``patch_embed`` in the name of its module. ``query/kernel [in, heads, width]`` is recognised by a
neighbouring ``out/kernel [heads, width, out]``. Kernels of ``LinearGeneral``, ``DenseGeneral`` and
``Einsum`` with three or more axes need a rule of yours."""

LINEN_RULES: Rules = COMMON_RULES
"""Rules for Flax Linen: the default."""

NNX_RULES: Rules = (
    _maybe(r"(^|/)(query|key|value)/kernel$", "matrix", ATTENTION_IN, ndim=3),
    _maybe(r"(^|/)out/kernel$", "matrix", ATTENTION_OUT, ndim=3),
    *COMMON_RULES,
)
"""Rules for Flax NNX: the default, with ``query``, ``key``, ``value`` and ``out`` of three axes always
treated as those of ``nnx.MultiHeadAttention``."""

EQUINOX_RULES: Rules = (*_NAMED, *_EXPERTS, *_EQUINOX, *_PLAIN)
"""Rules for Equinox, with weights `[out, in]`."""

HAIKU_RULES: Rules = (*_NAMED, *_EXPERTS, *_HAIKU, *_PLAIN)
"""Rules for Haiku, with parameters called ``w`` and ``b``."""

HUGGING_FACE_RULES: Rules = (
    # GPT-2 stores [out, in], with query, key and value in one kernel.
    _maybe(r"(^|/)c_attn/kernel$", "matrix", MatrixAxes((-1,), (-2,), column_parts=3)),
    _maybe(r"(^|/)c_(fc|proj)/kernel$", "matrix", OUT_IN),
    _maybe(r"(^|/)classifier/out_proj/kernel$", "head"),
    _maybe(r"(^|/)classifier/dense/kernel$", "matrix"),
    _maybe(r"(^|/)(score|(seq_relationship|decoder|\w*_projection))/kernel$", "head"),
    *COMMON_RULES,
)
"""Rules for Hugging Face's Flax models: the default, with GPT-2's kernels `[out, in]`."""

MAXTEXT_RULES: Rules = (
    _maybe(r"(^|/)(lm_head|logits|logits_dense)/kernel$", "head"),
    _maybe(r"embedding$", "embedding"),
    _maybe(r"(^|[/_])scale$", "norm"),
    _maybe(r"(^|[/_])bias$|(^|/)sinks$", "bias"),
    _maybe(r"(^|[/_])(router|gate)/kernel$", "router"),
    _maybe(
        r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$",
        "matrix",
        MatrixAxes((0,), (-2, -1)),
    ),
    _maybe(r"(^|/)out/kernel$", "matrix", MatrixAxes((0, -2), (-1,))),
    _maybe(r"(^|/)(wi|wi_0|wi_1|wo|wq_a|wkv_a)/kernel$", "matrix", MatrixAxes((0,), (-1,))),
    _maybe(r"MoeBlock_\d+/(wi_0|wi_1|wo)$", "matrix", IN_OUT),
)
"""Rules for text decoders of MaxText, dense, MLA and mixture of experts (August 2026).

Its scanned layers are at axis 1 (``param_scan_axis``): `[in, layers, heads, head width]`,
`[heads, layers, head width, out]`, `[in, layers, out]`, experts `[experts, layers, in, out]`.
Unscanned ones are covered too. ``qkv_proj`` (``fused_qkv``) needs the numbers of heads, and so a rule of
yours."""
