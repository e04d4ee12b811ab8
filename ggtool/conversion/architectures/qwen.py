"""Qwen 2 (biases on queries, keys and values) and Qwen 3 (norms on queries and keys, heads of any width)."""

from __future__ import annotations

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import BOOL, Architecture, Hparam, Weight

_FIXED = {"hidden_act": ("silu",), "use_sliding_window": (False,), "rope.type": common.ROPE_TYPES}

QWEN2 = Architecture(
    gguf_name="qwen2",
    hparams={
        **common.SIZES,
        **common.ROPE,
        **common.RMS_EPS,
        **common.FILE_TYPE,
        "head_dim": Hparam("", (), default="n_embd/n_head"),
        **common.VOCAB,
        **common.tied(default=False),
        "qkv_bias": Hparam("", (), BOOL, default=True),
    },
    tensors={
        **common.OUTER,
        **common.in_blocks(
            "model.layers.{}.", {**common.NORMS, **common.projections(bias="qkv_bias"), **common.GATED}
        ),
    },
    fixed=_FIXED,
)

QWEN3 = Architecture(
    gguf_name="qwen3",
    hparams={
        **common.SIZES,
        **common.ROPE,
        **common.RMS_EPS,
        # Not derived where it is absent: transformers' default is 128, whatever the sizes.
        **common.HEAD_DIM,
        "head_dim": Hparam(common.HEAD_DIM["head_dim"].key, ("head_dim",), default=128),
        **common.FILE_TYPE,
        **common.VOCAB,
        **common.tied(default=False),
    },
    tensors={
        **common.OUTER,
        **common.in_blocks(
            "model.layers.{}.",
            {
                **common.NORMS,
                **common.projections(),
                "self_attn.q_norm.weight": Weight("attn_q_norm.weight", "head_dim"),
                "self_attn.k_norm.weight": Weight("attn_k_norm.weight", "head_dim"),
                **common.GATED,
            },
        ),
    },
    fixed={**_FIXED, "attention_bias": (False,)},
)
