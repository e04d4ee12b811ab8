"""Llama and Mistral. llama.cpp rotates pairs of neighbours where transformers rotates halves of a head, so that the rows of queries and keys change places."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import (
    Architecture,
    Array,
    Hparam,
    Hparams,
    RopeKeys,
    Weight,
)


def _interleaved(stored: Array, hparams: Hparams) -> Array:
    """Turn heads of (first halves, second halves) into heads of pairs, as the original checkpoints have them."""
    half = int(hparams["head_dim"]) // 2
    heads = stored.reshape(-1, 2, half, *stored.shape[1:])
    paired = heads.swapaxes(1, 2)  # (n_head, head_dim / 2, 2, n_embd)
    return paired.reshape(-1) if stored.ndim == 1 else paired


_BIASES = {
    "mlp.gate_proj.bias": Weight("ffn_gate.bias", "n_ff", when="mlp_bias"),
    "mlp.up_proj.bias": Weight("ffn_up.bias", "n_ff", when="mlp_bias"),
    "mlp.down_proj.bias": Weight("ffn_down.bias", "n_embd", when="mlp_bias"),
}

LLAMA = Architecture(
    gguf_name="llama",
    defaults={**common.DEFAULTS, "head_dim": None, "attention_bias": False, "mlp_bias": False},
    nullable=frozenset({"head_dim", "num_key_value_heads"}),
    rope=RopeKeys(factors=True),
    hparams={
        **common.SIZES,
        **common.ROPE,
        **common.RMS_EPS,
        **common.HEAD_DIM,
        **common.FILE_TYPE,
        "n_vocab": Hparam(Keys.LLM.VOCAB_SIZE, ("vocab_size",)),
        "n_rot": Hparam(Keys.Rope.DIMENSION_COUNT, (), default="head_dim"),
        **common.TIED,
        **common.flag("attention_bias", "attention_bias"),
        **common.flag("mlp_bias", "mlp_bias"),
    },
    tensors={
        **common.OUTER,
        **common.in_blocks(
            "model.layers.{}.",
            {
                **common.NORMS,
                **common.projections(
                    rotary=_interleaved, bias="attention_bias", output_bias="attention_bias"
                ),
                **common.GATED,
                **_BIASES,
            },
        ),
    },
    drop=("model.layers.{}.self_attn.rotary_emb.inv_freq",),
    activation=("hidden_act", "silu"),
    fixed={"rope.type": (*common.ROPE_TYPES, "llama3", "longrope")},
    objection=common.plain_rope_objection,
    notes=common.rope_notes,
    computed=common.pair_factors,
    vocabulary="llama",
)
# Without biases, whatever its config says, as in transformers.
MISTRAL = replace(
    LLAMA,
    defaults={
        **{key: value for key, value in LLAMA.defaults.items() if not key.endswith("_bias")},
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    hparams={name: hparam for name, hparam in LLAMA.hparams.items() if not name.endswith("_bias")},
    tensors={name: weight for name, weight in LLAMA.tensors.items() if not weight.when},
    notes=partial(common.notes, "llama"),
)
