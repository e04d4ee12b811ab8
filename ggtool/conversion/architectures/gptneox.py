"""GPT-NeoX (Pythia): attention and feed-forward side by side, LayerNorm with biases, queries, keys and values fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import (
    BOOL,
    FLOAT,
    Architecture,
    Array,
    Hparam,
    Hparams,
    RopeKeys,
    Weight,
)
from ggtool.conversion.architectures.phi import n_rotated

_THETA = 10000.0  # llama.cpp's own default, which upstream leaves out


def _by_kind(stored: Array, hparams: Hparams) -> Array:
    """Put all queries first, then all keys, then all values, where the checkpoint has the three of each head."""
    heads = stored.reshape(int(hparams["n_head"]), 3, int(hparams["head_dim"]), *stored.shape[1:])
    kinds = heads.swapaxes(0, 1)  # (3, n_head, head_dim, n_embd)
    return kinds.reshape(-1) if stored.ndim == 1 else kinds


def _other_theta(_hparams: Hparams, settings: Mapping[str, Any]) -> float | None:
    theta = float(settings["rope.theta"])
    return None if theta == _THETA else theta


def _objection(hparams: Hparams, settings: Mapping[str, Any]) -> str:
    return common.head_objection(hparams, settings) or common.rope_objection(
        hparams, settings, int(hparams["n_rot"])
    )


_BLOCK = {
    "input_layernorm.weight": Weight("attn_norm.weight", "n_embd"),
    "input_layernorm.bias": Weight("attn_norm.bias", "n_embd"),
    "attention.query_key_value.weight": Weight("attn_qkv.weight", "3*n_embd n_embd", _by_kind),
    "attention.query_key_value.bias": Weight("attn_qkv.bias", "3*n_embd", _by_kind),
    "attention.dense.weight": Weight("attn_output.weight", "n_embd n_embd"),
    "attention.dense.bias": Weight("attn_output.bias", "n_embd"),
    "post_attention_layernorm.weight": Weight("ffn_norm.weight", "n_embd"),
    "post_attention_layernorm.bias": Weight("ffn_norm.bias", "n_embd"),
    "mlp.dense_h_to_4h.weight": Weight("ffn_up.weight", "n_ff n_embd"),
    "mlp.dense_h_to_4h.bias": Weight("ffn_up.bias", "n_ff"),
    "mlp.dense_4h_to_h.weight": Weight("ffn_down.weight", "n_embd n_ff"),
    "mlp.dense_4h_to_h.bias": Weight("ffn_down.bias", "n_embd"),
}

GPT_NEOX = Architecture(
    gguf_name="gptneox",
    model_type="gpt_neox",
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    rope=RopeKeys(theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25),
    # Upstream's own order; what it does not write comes last.
    hparams={
        "n_ctx": common.SIZES["n_ctx"],
        "n_embd": common.SIZES["n_embd"],
        "n_layer": common.SIZES["n_layer"],
        "n_ff": common.SIZES["n_ff"],
        "partial": Hparam("", ("rope.partial",), FLOAT),
        "heads": Hparam("", common.SIZES["n_head"].config),
        "head_dim": Hparam("", (), default="n_embd/heads"),
        "n_rot": Hparam(Keys.Rope.DIMENSION_COUNT, (), default=n_rotated),
        "n_head": common.SIZES["n_head"],
        "parallel": Hparam(Keys.LLM.USE_PARALLEL_RESIDUAL, ("use_parallel_residual",), BOOL),
        "norm_eps": Hparam(Keys.Attention.LAYERNORM_EPS, ("layer_norm_eps",), FLOAT),
        **common.VOCAB,
        **common.TIED,
        **common.ROPE,
        "rope_base": replace(common.ROPE["rope_base"], config=(), default=_other_theta, optional=True),
    },
    tensors={
        "gpt_neox.embed_in.weight": Weight("token_embd.weight", "n_vocab n_embd"),
        "gpt_neox.final_layer_norm.weight": Weight("output_norm.weight", "n_embd"),
        "gpt_neox.final_layer_norm.bias": Weight("output_norm.bias", "n_embd"),
        "embed_out.weight": Weight(
            "output.weight", "n_vocab n_embd", repeats="gpt_neox.embed_in.weight", written=True
        ),
        **common.in_blocks("gpt_neox.layers.{}.", _BLOCK),
    },
    drop=(
        "gpt_neox.layers.{}.attention.bias",
        "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
    ),
    base_prefix="gpt_neox.",
    activation=("hidden_act", "gelu_pytorch_tanh"),
    fixed={"attention_bias": (True,), "rope.type": common.ROPE_TYPES},
    objection=_objection,
    notes=common.rope_notes,
)
