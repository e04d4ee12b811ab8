"""Gemma 2 and the text model of Gemma 3: norms stored less one, four of them a block, windows on most blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import (
    FLAGS,
    FLOAT,
    Architecture,
    Hparam,
    Hparams,
    RopeKeys,
    Weight,
)
from ggtool.conversion.architectures.rope import spelled

Settings = Mapping[str, Any]

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
}
_FIXED = {"attention_bias": (False,), "use_bidirectional_attention": (False,)}
_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
# The largest of either family scales queries by the width of the model over its heads; llama.cpp knows it by its depth.
_LARGEST = {"gemma2": 46, "gemma3": 62}
# One block in so many attends to the whole text.
_PERIOD = {"gemma2": 2, "gemma3": 6}
# llama.cpp's graph always bounds these; with a bound so far away, the tanh is the number itself to the last bit.
_NO_CAP = float(1 << 20)


def _windows(name: str, hparams: Hparams, settings: Settings) -> list[bool]:
    """Return which blocks have a sliding window."""
    kinds = settings["layer_types"]
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    period = int(hparams.get("period", _PERIOD[name]))
    return [bool(number % period) for number in range(1, int(hparams["n_layer"]) + 1)]


def _other_windows(name: str, hparams: Hparams, settings: Settings) -> list[bool] | None:
    """Return them where they differ from llama.cpp's own pattern. It has no graph for windows on no block."""
    found = _windows(name, hparams, settings)
    usual = [bool(number % _PERIOD[name]) for number in range(1, len(found) + 1)]
    return found if any(found) and found != usual else None


def _gemma2_window(hparams: Hparams, settings: Settings) -> int | None:
    # A window as long as the context is none.
    windows = _windows("gemma2", hparams, settings)
    return settings["sliding_window"] if any(windows) else int(hparams["n_ctx"])


def _gemma3_window(hparams: Hparams, settings: Settings) -> int | None:
    return settings["sliding_window"] if any(_windows("gemma3", hparams, settings)) else None


def _pattern(name: str) -> dict[str, Hparam]:
    return {
        "windows": Hparam(
            Keys.Attention.SLIDING_WINDOW_PATTERN,
            (),
            FLAGS,
            default=lambda hparams, settings: _other_windows(name, hparams, settings),
            optional=True,
        )
    }


def _query_scale(name: str, hparams: Hparams) -> Mapping[str, Any]:
    """Return the scale of queries that llama.cpp's graph has built in, as config.json spells it."""
    largest = hparams["n_layer"] == _LARGEST[name]
    scale = hparams["n_embd"] // hparams["n_head"] if largest else hparams["head_dim"]
    return {"query_pre_attn_scalar": scale}


def _objection(name: str, hparams: Hparams, settings: Settings) -> str:
    """Say which setting differs from what is built into llama.cpp's graph."""
    (scale,) = _query_scale(name, hparams).values()
    if settings["query_pre_attn_scalar"] != scale:
        return f"query_pre_attn_scalar = {settings['query_pre_attn_scalar']!r} and not {scale}"
    kinds = settings["layer_types"]
    if kinds is not None and not set(kinds) <= {"full_attention", "sliding_attention"}:
        return f"layer_types = {kinds!r}"
    return common.plain_rope_objection(hparams, settings)


def _gemma3_objection(hparams: Hparams, settings: Settings) -> str:
    if settings["rope.type"] == "yarn" and "rope_attention" in hparams:
        key = "mscale" if settings.get("rope.attention_factor") is None else "attention_factor"
        return f"{spelled(f'rope.{key}', settings)} for full blocks alone"
    return _objection("gemma3", hparams, settings)


GEMMA2 = Architecture(
    gguf_name="gemma2",
    defaults={
        "vocab_size": 256000,
        **_DEFAULTS,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    nullable=frozenset({"final_logit_softcapping", "attn_logit_softcapping"}),
    rope=RopeKeys(),
    # Upstream's own order, the context first; what it does not write comes last.
    hparams={
        **{
            name: common.SIZES[name] for name in ("n_ctx", "n_embd", "n_layer", "n_ff", "n_head", "n_head_kv")
        },
        **common.RMS_EPS,
        **common.HEAD_DIM,
        **common.FILE_TYPE,
        "attn_cap": Hparam(
            Keys.LLM.ATTN_LOGIT_SOFTCAPPING, ("attn_logit_softcapping",), FLOAT, default=_NO_CAP
        ),
        "final_cap": Hparam(
            Keys.LLM.FINAL_LOGIT_SOFTCAPPING, ("final_logit_softcapping",), FLOAT, default=_NO_CAP
        ),
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, (), default=_gemma2_window),
        **common.VOCAB,
        **common.TIED,
        **common.ROPE,
        "rope_base": replace(
            common.ROPE["rope_base"],
            config=(),
            default=lambda _, settings: None if settings["rope.theta"] == 10000 else settings["rope.theta"],
            optional=True,
        ),
        **_pattern("gemma2"),
    },
    tensors={
        **_OUTER,
        "lm_head.weight": replace(common.OUTER["lm_head.weight"], only_copy=True),
        **common.in_blocks("model.layers.{}.", {**_NORMS, **common.projections(), **common.GATED}),
    },
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    fixed={**_FIXED, "rope.type": common.ROPE_TYPES},
    objection=lambda hparams, settings: _objection("gemma2", hparams, settings),
    implied=lambda hparams: _query_scale("gemma2", hparams),
    notes=common.rope_notes,
    vocabulary="gemma",
)

GEMMA3 = Architecture(
    gguf_name="gemma3",
    model_type="gemma3_text",
    defaults={
        "vocab_size": 262208,
        **_DEFAULTS,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 6,
    },
    nullable=frozenset({"use_bidirectional_attention"}),
    rope=RopeKeys(by_layer=True, default_theta=1_000_000.0),
    hparams={
        **common.SIZES,
        "period": Hparam("", ("sliding_window_pattern",)),
        **common.ROPE,
        "rope_base_window": Hparam(Keys.Rope.FREQ_BASE_SWA, ("rope.local_theta",), FLOAT),
        **common.RMS_EPS,
        **common.HEAD_DIM,
        **common.FILE_TYPE,
        "final_cap": Hparam(
            Keys.LLM.FINAL_LOGIT_SOFTCAPPING, ("final_logit_softcapping",), FLOAT, optional=True
        ),
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, (), default=_gemma3_window, optional=True),
        **common.VOCAB,
        **common.TIED,
        **_pattern("gemma3"),
    },
    tensors={
        **_OUTER,
        **common.in_blocks(
            "model.layers.{}.", {**_NORMS, **common.projections(), **_QK_NORMS, **common.GATED}
        ),
    },
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    fixed={**_FIXED, "rope.type": common.ROPE_TYPES, "rope.local_type": ("default", "dynamic")},
    objection=_gemma3_objection,
    implied=lambda hparams: _query_scale("gemma3", hparams),
    notes=common.rope_notes,
    vocabulary="gemma",
)
# Beside an image encoder: whether the head is tied is said outside the text model's settings, and transformers bounds
# no logits.
GEMMA3_WITH_IMAGES = replace(
    GEMMA3,
    nested=True,
    hparams={
        **{name: hparam for name, hparam in GEMMA3.hparams.items() if name != "final_cap"},
        "tied": replace(
            common.TIED["tied"],
            config=(),
            default=lambda _, settings: settings["outer"].get("tie_word_embeddings", True),
        ),
    },
    drop_under=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
    strip=("language_model.",),
)
