"""What several rows share: the hyperparameters every decoder of Llama's kind has, and its tensors.

The dicts are joined in a row in the order of upstream's writer, which has the file type among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gguf.constants import Keys

from ggtool.conversion.architectures.architecture import (
    BOOL,
    FLOAT,
    STRING,
    Hparam,
    View,
    Weight,
    as_stored,
)

EMBEDDING = "model.embed_tokens.weight"
# Rotary embeddings that every graph of llama.cpp computes; "default" is the plain one.
ROPE_TYPES = ("default", "linear", "yarn")

_SCALED = ("rope.type", ("linear", "yarn"))
_YARN = ("rope.type", ("yarn",))

SIZES: Mapping[str, Hparam] = {
    "n_layer": Hparam(Keys.LLM.BLOCK_COUNT, ("num_hidden_layers",)),
    "n_ctx": Hparam(Keys.LLM.CONTEXT_LENGTH, ("max_position_embeddings",)),
    "n_embd": Hparam(Keys.LLM.EMBEDDING_LENGTH, ("hidden_size",)),
    "n_ff": Hparam(Keys.LLM.FEED_FORWARD_LENGTH, ("intermediate_size",)),
    "n_head": Hparam(Keys.Attention.HEAD_COUNT, ("num_attention_heads",)),
    "n_head_kv": Hparam(Keys.Attention.HEAD_COUNT_KV, ("num_key_value_heads",)),
}


def _yarn(key: str, source: str) -> Hparam:
    return Hparam(key, (source,), FLOAT, optional=True, when=_YARN)


ROPE: Mapping[str, Hparam] = {
    "rope_scaling": Hparam(Keys.Rope.SCALING_TYPE, ("rope.type",), STRING, when=_SCALED),
    "rope_factor": Hparam(Keys.Rope.SCALING_FACTOR, ("rope.factor",), FLOAT, when=_SCALED),
    "rope_original": Hparam(Keys.Rope.SCALING_ORIG_CTX_LEN, ("rope.original",), when=_YARN),
    "yarn_ext": _yarn(Keys.Rope.SCALING_YARN_EXT_FACTOR, "rope.extrapolation_factor"),
    "yarn_attn": _yarn(Keys.Rope.SCALING_YARN_ATTN_FACTOR, "rope.attention_factor"),
    "yarn_fast": _yarn(Keys.Rope.SCALING_YARN_BETA_FAST, "rope.beta_fast"),
    "yarn_slow": _yarn(Keys.Rope.SCALING_YARN_BETA_SLOW, "rope.beta_slow"),
    "rope_base": Hparam(Keys.Rope.FREQ_BASE, ("rope.theta",), FLOAT, default=10000.0),
}
RMS_EPS: Mapping[str, Hparam] = {
    "norm_eps": Hparam(Keys.Attention.LAYERNORM_RMS_EPS, ("rms_norm_eps",), FLOAT, default=1e-6)
}
# The width of a head: one for keys and values, which GGUF lists apart.
HEAD_DIM: Mapping[str, Hparam] = {
    "head_dim": Hparam(Keys.Attention.KEY_LENGTH, ("head_dim",), default="n_embd/n_head"),
    "n_value": Hparam(Keys.Attention.VALUE_LENGTH, ("head_dim",), default="head_dim"),
}
FILE_TYPE: Mapping[str, Hparam] = {"file_type": Hparam(Keys.General.FILE_TYPE, (), default=0, least=0)}
VOCAB: Mapping[str, Hparam] = {"n_vocab": Hparam("", ("vocab_size",))}


def flag(name: str, key: str, *, default: bool) -> dict[str, Hparam]:
    """Return a setting that decides about tensors and is not written."""
    return {name: Hparam("", (key,), BOOL, default=default)}


def tied(*, default: bool) -> dict[str, Hparam]:
    """Return the setting that makes the embedding the output head too."""
    return flag("tied", "tie_word_embeddings", default=default)


def in_blocks(prefix: str, block: Mapping[str, Weight]) -> dict[str, Weight]:
    """Put the tensors of one block under their names in the whole model."""
    return {prefix + name: replace(weight, name="blk.{}." + weight.name) for name, weight in block.items()}


def projections(*, rotary: View = as_stored, bias: str = "", output_bias: str = "") -> dict[str, Weight]:
    """Return the matrices of attention, and biases under the flags named; `rotary` turns queries and keys."""
    weights = {
        "self_attn.q_proj.weight": Weight("attn_q.weight", "n_head*head_dim n_embd", rotary),
        "self_attn.k_proj.weight": Weight("attn_k.weight", "n_head_kv*head_dim n_embd", rotary),
        "self_attn.v_proj.weight": Weight("attn_v.weight", "n_head_kv*head_dim n_embd"),
        "self_attn.o_proj.weight": Weight("attn_output.weight", "n_embd n_head*head_dim"),
    }
    biases = {
        "self_attn.q_proj.bias": Weight("attn_q.bias", "n_head*head_dim", rotary, when=bias),
        "self_attn.k_proj.bias": Weight("attn_k.bias", "n_head_kv*head_dim", rotary, when=bias),
        "self_attn.v_proj.bias": Weight("attn_v.bias", "n_head_kv*head_dim", when=bias),
        "self_attn.o_proj.bias": Weight("attn_output.bias", "n_embd", when=output_bias),
    }
    return {**weights, **{name: weight for name, weight in biases.items() if weight.when}}


GATED: Mapping[str, Weight] = {
    "mlp.gate_proj.weight": Weight("ffn_gate.weight", "n_ff n_embd"),
    "mlp.up_proj.weight": Weight("ffn_up.weight", "n_ff n_embd"),
    "mlp.down_proj.weight": Weight("ffn_down.weight", "n_embd n_ff"),
}
NORMS: Mapping[str, Weight] = {
    "input_layernorm.weight": Weight("attn_norm.weight", "n_embd"),
    "post_attention_layernorm.weight": Weight("ffn_norm.weight", "n_embd"),
}
OUTER: Mapping[str, Weight] = {
    EMBEDDING: Weight("token_embd.weight", "n_vocab n_embd"),
    "model.norm.weight": Weight("output_norm.weight", "n_embd"),
    "lm_head.weight": Weight("output.weight", "n_vocab n_embd", repeats=EMBEDDING),
}
