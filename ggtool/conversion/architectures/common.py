"""What several rows share: the hyperparameters that every decoder of Llama's kind has, its tensors, its limits.

The dicts are joined in a row in the order of upstream's writer, which has the file type among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from ggtool.conversion.architectures.architecture import (
    BOOL,
    FLOAT,
    STRING,
    Hparam,
    Hparams,
    View,
    Weight,
    as_stored,
)
from ggtool.conversion.architectures.config import WRITTEN
from ggtool.conversion.architectures.rope import (
    frequency_factors,
    long_attention,
    spelled,
    yarn_as_llama_cpp,
    yarn_attention,
    yarn_factor,
)

Settings = Mapping[str, Any]

EMBEDDING = "model.embed_tokens.weight"
# Kinds of rope that every graph of llama.cpp computes within the context of the model.
ROPE_TYPES = ("default", "linear", "yarn", "dynamic")
# transformers' defaults of what every config class of Llama's kind has.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

SIZES: Mapping[str, Hparam] = {
    "n_layer": Hparam(Keys.LLM.BLOCK_COUNT, ("num_hidden_layers",)),
    "n_ctx": Hparam(Keys.LLM.CONTEXT_LENGTH, ("max_position_embeddings",)),
    "n_embd": Hparam(Keys.LLM.EMBEDDING_LENGTH, ("hidden_size",)),
    "n_ff": Hparam(Keys.LLM.FEED_FORWARD_LENGTH, ("intermediate_size",)),
    "n_head": Hparam(Keys.Attention.HEAD_COUNT, ("num_attention_heads",)),
    "n_head_kv": Hparam(Keys.Attention.HEAD_COUNT_KV, ("num_key_value_heads",), default="n_head"),
}


def _factor(hparams: Hparams, settings: Settings) -> float:
    return (
        yarn_factor(hparams, settings) if settings["rope.type"] == "yarn" else float(settings["rope.factor"])
    )


def attention_factor(hparams: Hparams, settings: Settings) -> float | None:
    """Return by how much llama.cpp must scale rotated queries and keys beyond its own; None where it need not."""
    n_ctx = int(hparams["n_ctx"])
    if settings[WRITTEN] == "longrope":
        return long_attention(settings, n_ctx)
    if settings["rope.type"] != "yarn":
        return None
    scale = yarn_attention(settings, n_ctx)
    if settings[WRITTEN] == "factors":  # llama.cpp's YaRN and its own scale are then left out
        scale *= 1 + 0.1 * math.log(max(yarn_factor(hparams, settings), 1.0))
    return scale if abs(scale - 1) > 1e-9 else None


ROPE: Mapping[str, Hparam] = {
    "rope_scaling": Hparam(
        Keys.Rope.SCALING_TYPE, (WRITTEN,), STRING, when=(WRITTEN, ("linear", "yarn", "longrope"))
    ),
    "rope_factor": Hparam(
        Keys.Rope.SCALING_FACTOR, (), FLOAT, default=_factor, when=(WRITTEN, ("linear", "yarn"))
    ),
    "rope_original": Hparam(
        Keys.Rope.SCALING_ORIG_CTX_LEN, ("rope.original",), when=(WRITTEN, ("yarn", "longrope"))
    ),
    "rope_attention": Hparam(
        Keys.Rope.SCALING_ATTN_FACTOR, (), FLOAT, default=attention_factor, optional=True
    ),
    "rope_base": Hparam(Keys.Rope.FREQ_BASE, ("rope.theta",), FLOAT),
}
RMS_EPS: Mapping[str, Hparam] = {
    "norm_eps": Hparam(Keys.Attention.LAYERNORM_RMS_EPS, ("rms_norm_eps",), FLOAT)
}
# The width of a head: one for keys and values, which GGUF lists apart.
HEAD_DIM: Mapping[str, Hparam] = {
    "head_dim": Hparam(Keys.Attention.KEY_LENGTH, ("head_dim",), default="n_embd/n_head"),
    "n_value": Hparam(Keys.Attention.VALUE_LENGTH, (), default="head_dim"),
}
# Where llama.cpp takes it from the width of the model.
DERIVED_HEAD_DIM: Mapping[str, Hparam] = {"head_dim": Hparam("", (), default="n_embd/n_head")}
FILE_TYPE: Mapping[str, Hparam] = {"file_type": Hparam(Keys.General.FILE_TYPE, (), default=0, least=0)}
VOCAB: Mapping[str, Hparam] = {"n_vocab": Hparam("", ("vocab_size",))}
TIED: Mapping[str, Hparam] = {"tied": Hparam("", ("tie_word_embeddings",), BOOL)}


def flag(name: str, key: str) -> dict[str, Hparam]:
    """Return a setting that decides about tensors and is not written."""
    return {name: Hparam("", (key,), BOOL)}


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


def pair_factors(hparams: Hparams, settings: Settings) -> Mapping[str, npt.NDArray[np.float32]]:
    """Return rope_freqs.weight, by which llama.cpp divides the frequency of each rotated pair, where it is needed."""
    if settings[WRITTEN] == "longrope":
        return long_factors(hparams, settings)
    if settings[WRITTEN] != "factors":
        return {}
    return {"rope_freqs.weight": frequency_factors(settings, int(hparams["head_dim"]), int(hparams["n_ctx"]))}


def long_factors(_hparams: Hparams, settings: Settings) -> Mapping[str, npt.NDArray[np.float32]]:
    """Return LongRoPE's two sets of factors, for long texts and for short ones."""
    return {
        f"rope_factors_{length}.weight": np.array(settings[f"rope.{length}_factor"], np.float32)
        for length in ("long", "short")
    }


def head_objection(hparams: Hparams, settings: Settings) -> str:
    """Say which setting makes heads of another width than the model's width over its heads."""
    given = settings.get("head_dim", hparams["head_dim"])
    if given != hparams["head_dim"]:
        return f"head_dim = {given!r} and not hidden_size / num_attention_heads"
    if hparams["n_embd"] % hparams["n_head"]:
        return f"hidden_size = {hparams['n_embd']} that num_attention_heads = {hparams['n_head']} does not divide"
    return ""


def rope_objection(hparams: Hparams, settings: Settings, n_rot: int) -> str:
    """Say which rotary setting llama.cpp's graph would get wrong."""
    head_dim = int(hparams["head_dim"])
    if n_rot % 2 or n_rot < 2:
        # The part that is rotated may be what is odd, or the head itself.
        key = "partial" if n_rot != head_dim else ""
        what = (
            f"{spelled('rope.partial', settings)} = {settings.get('rope.partial')!r}" if key else "head_dim"
        )
        return f"{what}, so that {n_rot} numbers of a head are rotated"
    if settings[WRITTEN] == "yarn" and (other := yarn_as_llama_cpp(settings)):
        return other
    if settings[WRITTEN] == "longrope":
        for name in ("rope.long_factor", "rope.short_factor"):
            factors = settings.get(name)
            if (
                not isinstance(factors, list)
                or len(factors) != n_rot // 2
                or not all(map(_is_number, factors))
            ):
                return (
                    f"{spelled(name, settings)} without a number for each of the {n_rot // 2} rotated pairs"
                )
    return ""


def plain_rope_objection(hparams: Hparams, settings: Settings) -> str:
    """Say the same for families that rotate whole heads."""
    partial = settings.get("rope.partial")
    head_dim = int(hparams["head_dim"])
    if settings["rope.type"] != "default" and partial is not None and int(head_dim * partial) != head_dim:
        return f"{spelled('rope.partial', settings)} = {partial!r} with {spelled('rope.type', settings)} = {settings['rope.type']!r}"
    return rope_objection(hparams, settings, head_dim)


def rope_notes(hparams: Hparams, settings: Settings) -> list[str]:
    """Note the kinds of rope that transformers makes dependent on the length of a text."""
    kind, n_ctx = settings["rope.type"], hparams["n_ctx"]
    name = spelled("rope.type", settings)
    if dynamic := [key for key in ("rope.type", "rope.local_type") if settings.get(key) == "dynamic"]:
        return [
            f"config.json has {spelled(dynamic[0], settings)} = dynamic: in texts beyond {n_ctx} tokens transformers "
            "changes the frequencies, and llama.cpp does not."
        ]
    # llama.cpp rounds a context up to 256 tokens.
    if kind == "longrope" and -(-n_ctx // 256) * 256 > settings["rope.original"]:
        return [
            f"config.json has {name} = longrope: transformers takes long_factor for texts beyond "
            f"{settings['rope.original']} tokens, llama.cpp for contexts beyond them, however short the text."
        ]
    return []


def window_note(window: int | None, hparams: Hparams, gguf_name: str) -> list[str]:
    """Note a sliding window that llama.cpp's graph lacks, where a text can be longer."""
    if window is None or window >= hparams["n_ctx"]:
        return []
    return [
        f"config.json has sliding_window = {window}, which llama.cpp's {gguf_name} lacks: in texts beyond {window} tokens "
        "it attends to more than transformers does, and its logits differ."
    ]


def notes(gguf_name: str, hparams: Hparams, settings: Settings) -> Sequence[str]:
    """Note all of these for a family whose every block has the window."""
    return [*window_note(settings.get("sliding_window"), hparams, gguf_name), *rope_notes(hparams, settings)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value)) and value > 0
