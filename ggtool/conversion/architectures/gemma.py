"""Gemma 2 and the text model of Gemma 3: norms stored less one, four of them a block, windows on most blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import FLOAT, Architecture, Hparam, Hparams, Weight

_NORMS = {
    "input_layernorm.weight": Weight("attn_norm.weight", "n_embd", plus=1),
    "post_attention_layernorm.weight": Weight("post_attention_norm.weight", "n_embd", plus=1),
    "pre_feedforward_layernorm.weight": Weight("ffn_norm.weight", "n_embd", plus=1),
    "post_feedforward_layernorm.weight": Weight("post_ffw_norm.weight", "n_embd", plus=1),
}
_QK_NORMS = {
    "self_attn.q_norm.weight": Weight("attn_q_norm.weight", "head_dim", plus=1),
    "self_attn.k_norm.weight": Weight("attn_k_norm.weight", "head_dim", plus=1),
}
_OUTER = {
    **common.OUTER,
    "model.norm.weight": Weight("output_norm.weight", "n_embd", plus=1),
    "lm_head.weight": replace(common.OUTER["lm_head.weight"], only_copy=True),
}
_HEAD_DIM = {name: replace(hparam, default=256) for name, hparam in common.HEAD_DIM.items()}
_FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
}
# The largest of either family scales queries by the width of the model over its heads; it is known by its depth.
_LARGEST = {"gemma2": 46, "gemma3": 62}


def _objection(every: int, name: str, hparams: Hparams, config: Mapping[str, Any]) -> str:
    """Say which query scale or pattern of windows differs from the one built into llama.cpp's graph."""
    largest = hparams["n_layer"] == _LARGEST[name]
    scale = hparams["n_embd"] // hparams["n_head"] if largest else hparams["head_dim"]
    if config.get("query_pre_attn_scalar", 256) != scale:
        return f"query_pre_attn_scalar = {config.get('query_pre_attn_scalar', 256)!r} and not {scale}"
    kinds = config.get("layer_types")
    period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", every))
    full = [number % every == 0 for number in range(1, int(hparams["n_layer"]) + 1)]
    if period != every or (kinds is not None and [kind == "full_attention" for kind in kinds] != full):
        return f"another order of full and sliding attention than one full block in {every}"
    return ""


GEMMA2 = Architecture(
    gguf_name="gemma2",
    # Upstream's own order: the context first.
    hparams={
        **{
            name: common.SIZES[name] for name in ("n_ctx", "n_embd", "n_layer", "n_ff", "n_head", "n_head_kv")
        },
        **common.RMS_EPS,
        **_HEAD_DIM,
        **common.FILE_TYPE,
        "attn_cap": Hparam(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, ("attn_logit_softcapping",), FLOAT, default=50.0),
        "final_cap": Hparam(
            Keys.LLM.FINAL_LOGIT_SOFTCAPPING, ("final_logit_softcapping",), FLOAT, default=30.0
        ),
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, ("sliding_window",), default=4096),
        **common.VOCAB,
        **common.tied(default=True),
    },
    tensors={
        **_OUTER,
        **common.in_blocks("model.layers.{}.", {**_NORMS, **common.projections(), **common.GATED}),
    },
    # llama.cpp has no key of it to read here, and its own default is the one all Gemma 2 have.
    fixed={
        **_FIXED,
        "rope.type": ("default",),
        "rope.theta": (10000, 10000.0),
        "tie_word_embeddings": (True,),
    },
    objection=lambda hparams, config: _objection(2, "gemma2", hparams, config),
    vocabulary="gemma",
)

_DEFAULTS = {"n_layer": 26, "n_ctx": 131072, "n_embd": 2304, "n_ff": 9216, "n_head": 8, "n_head_kv": 4}

GEMMA3 = Architecture(
    gguf_name="gemma3",
    hparams={
        # The larger ones' config.json, with an image encoder beside the text model, leaves much to the defaults.
        **{name: replace(hparam, default=_DEFAULTS[name]) for name, hparam in common.SIZES.items()},
        **common.ROPE,
        "rope_base": replace(common.ROPE["rope_base"], default=1_000_000.0),
        "rope_base_window": Hparam(Keys.Rope.FREQ_BASE_SWA, ("rope.local_theta",), FLOAT, default=10000.0),
        **common.RMS_EPS,
        **_HEAD_DIM,
        **common.FILE_TYPE,
        "final_cap": Hparam(
            Keys.LLM.FINAL_LOGIT_SOFTCAPPING, ("final_logit_softcapping",), FLOAT, optional=True
        ),
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, ("sliding_window",), default=4096),
        "n_vocab": Hparam("", ("vocab_size",), default=262208),
        **common.tied(default=True),
    },
    tensors={
        **_OUTER,
        **common.in_blocks(
            "model.layers.{}.", {**_NORMS, **common.projections(), **_QK_NORMS, **common.GATED}
        ),
    },
    drop_under=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
    strip=("language_model.",),
    fixed={
        **_FIXED,
        "rope.type": ("default", "linear"),
        "rope.local_type": ("default",),
        "tie_word_embeddings": (True,),
    },
    objection=lambda hparams, config: _objection(6, "gemma3", hparams, config),
    vocabulary="gemma",
)
