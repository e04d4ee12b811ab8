"""Phi-3 and Phi-4: queries, keys and values fused, gate and up fused, two sets of rope factors for long texts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import (
    FLOAT,
    Architecture,
    Hparam,
    Hparams,
    RopeKeys,
    Weight,
)


def n_rotated(hparams: Hparams, _settings: Mapping[str, Any]) -> int:
    """Return how many numbers of a head are rotated, rounded as transformers rounds."""
    return int(int(hparams["head_dim"]) * float(hparams["partial"]))


def _objection(hparams: Hparams, settings: Mapping[str, Any]) -> str:
    return common.head_objection(hparams, settings) or common.rope_objection(
        hparams, settings, int(hparams["n_rot"])
    )


def _computed(hparams: Hparams, settings: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
    return common.long_factors(hparams, settings) if settings["rope.type"] == "longrope" else {}


PHI3 = Architecture(
    gguf_name="phi3",
    defaults={
        **common.DEFAULTS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    rope=RopeKeys(default_partial=1.0, renamed={"su": "longrope", "yarn": "longrope"}),
    # Upstream's own order.
    hparams={
        "n_ctx": common.SIZES["n_ctx"],
        "rope_original": Hparam(Keys.Rope.SCALING_ORIG_CTX_LEN, ("original_max_position_embeddings",)),
        "n_embd": common.SIZES["n_embd"],
        "n_ff": common.SIZES["n_ff"],
        "n_layer": common.SIZES["n_layer"],
        "n_head": common.SIZES["n_head"],
        "n_head_kv": common.SIZES["n_head_kv"],
        "norm_eps": common.RMS_EPS["norm_eps"],
        **common.DERIVED_HEAD_DIM,
        "partial": Hparam("", ("rope.partial",), FLOAT),
        "n_rot": Hparam(Keys.Rope.DIMENSION_COUNT, (), default=n_rotated),
        "rope_base": common.ROPE["rope_base"],
        **common.FILE_TYPE,
        "n_window": Hparam(Keys.Attention.SLIDING_WINDOW, ("sliding_window",), default=0, least=0),
        "rope_attention": common.ROPE["rope_attention"],
        **common.VOCAB,
        **common.TIED,
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
    activation=("hidden_act", "silu"),
    fixed={"rope.type": ("default", "longrope")},
    objection=_objection,
    notes=partial(common.notes, "phi3"),
    computed=_computed,
    vocabulary="phi3",
)
