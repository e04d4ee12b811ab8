"""Phi-3 and Phi-4: queries, keys and values fused, gate and up fused, two sets of rope factors for long texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import FLOAT, Architecture, Hparam, Hparams, Weight

_LONG = ("rope.type", ("longrope",))


def _rope_factors(_hparams: Hparams, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
    if config.get("rope.type") != "longrope":
        return {}
    return {
        f"rope_factors_{length}.weight": np.array(config[f"rope.{length}_factor"], np.float32)
        for length in ("long", "short")
    }


def _objection(hparams: Hparams, config: Mapping[str, Any]) -> str:
    if config.get("rope.type") != "longrope":
        return ""
    n_pairs = int(hparams["n_rot"]) // 2
    for key in ("rope.long_factor", "rope.short_factor"):
        factors = config.get(key)
        if not isinstance(factors, list) or len(factors) != n_pairs or not all(map(_is_number, factors)):
            return f"{key} without a number for each of the {n_pairs} rotated pairs"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def attention_factor(n_ctx: int, original: int) -> float:
    """Return by how much LongRoPE scales attention, for a context stretched from `original` tokens to `n_ctx`."""
    stretch = n_ctx / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _attention_factor(hparams: Hparams, _config: Mapping[str, Any]) -> float:
    return attention_factor(int(hparams["n_ctx"]), int(hparams["rope_original"]))


PHI3 = Architecture(
    gguf_name="phi3",
    # Upstream's own order.
    hparams={
        "n_ctx": common.SIZES["n_ctx"],
        "rope_original": Hparam(Keys.Rope.SCALING_ORIG_CTX_LEN, ("rope.original",), default=4096),
        "n_embd": common.SIZES["n_embd"],
        "n_ff": common.SIZES["n_ff"],
        "n_layer": common.SIZES["n_layer"],
        "n_head": common.SIZES["n_head"],
        "n_head_kv": Hparam(common.SIZES["n_head_kv"].key, ("num_key_value_heads",), default="n_head"),
        "norm_eps": Hparam(Keys.Attention.LAYERNORM_RMS_EPS, ("rms_norm_eps",), FLOAT, default=1e-5),
        "partial": Hparam("", ("rope.partial",), FLOAT, default=1.0),
        "n_rot": Hparam(Keys.Rope.DIMENSION_COUNT, (), default="partial*n_embd/n_head"),
        "rope_base": common.ROPE["rope_base"],
        **common.FILE_TYPE,
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, ("sliding_window",), default=0, least=0),
        "attention_factor": Hparam(
            Keys.Rope.SCALING_ATTN_FACTOR, (), FLOAT, default=_attention_factor, when=_LONG
        ),
        "head_dim": Hparam("", (), default="n_embd/n_head"),
        **common.VOCAB,
        **common.tied(default=False),
    },
    tensors={
        **common.OUTER,
        **common.in_blocks(
            "model.layers.{}.",
            {
                **common.NORMS,
                "self_attn.qkv_proj.weight": Weight("attn_qkv.weight", "n_embd+2*n_head_kv*head_dim n_embd"),
                "self_attn.o_proj.weight": Weight("attn_output.weight", "n_embd n_embd"),
                # Gate above up in one matrix, as llama.cpp's graph splits it.
                "mlp.gate_up_proj.weight": Weight("ffn_up.weight", "2*n_ff n_embd"),
                "mlp.down_proj.weight": Weight("ffn_down.weight", "n_embd n_ff"),
            },
        ),
    },
    fixed={"hidden_act": ("silu",), "rope.type": ("default", "longrope")},
    objection=_objection,
    computed=_rope_factors,
    vocabulary="phi3",
)
