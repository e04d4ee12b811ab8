"""Llama and Mistral: one graph in llama.cpp, which pairs the two halves of a rotated head otherwise than Llama's
checkpoints on the Hub do, so that the rows of queries and keys change places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import (
    FLOAT,
    Architecture,
    Array,
    Hparam,
    Hparams,
    Weight,
)


def _interleaved(stored: Array, hparams: Hparams) -> Array:
    """Turn heads of (first halves, second halves) into heads of pairs, as the original checkpoints have them."""
    half = int(hparams["head_dim"]) // 2
    heads = stored.reshape(-1, 2, half, *stored.shape[1:])
    paired = heads.swapaxes(1, 2)  # (n_head, head_dim / 2, 2, n_embd)
    return paired.reshape(-1) if stored.ndim == 1 else paired


def _rope_freqs(hparams: Hparams, config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
    """Compute Llama 3's factors, one for each rotated pair; llama.cpp divides the pair's frequency by it."""
    if config.get("rope.type") != "llama3":
        return {}
    n_pairs = int(hparams["head_dim"]) // 2
    factor, low, high = (hparams[name] for name in ("llama3_factor", "llama3_low", "llama3_high"))
    original = hparams["llama3_original"]
    # In float32, as upstream computes them.
    exponents = np.arange(0, 2 * n_pairs, 2, dtype=np.float32) / np.float32(2 * n_pairs)
    wavelengths = [2 * math.pi / float(f) for f in 1 / np.float32(hparams["rope_base"]) ** exponents]
    factors = []
    for wavelength in wavelengths:
        smooth = (original / wavelength - low) / (high - low)
        factors.append(
            1 / ((1 - smooth) / factor + smooth) if 0 <= smooth <= 1 else 1.0 if smooth > 1 else factor
        )
    return {"rope_freqs.weight": np.array(factors, np.float32)}


_LLAMA3 = ("rope.type", ("llama3",))
_BIASES = {
    "mlp.gate_proj.bias": Weight("ffn_gate.bias", "n_ff", when="mlp_bias"),
    "mlp.up_proj.bias": Weight("ffn_up.bias", "n_ff", when="mlp_bias"),
    "mlp.down_proj.bias": Weight("ffn_down.bias", "n_embd", when="mlp_bias"),
}

LLAMA = Architecture(
    gguf_name="llama",
    hparams={
        **common.SIZES,
        "n_head_kv": replace(common.SIZES["n_head_kv"], default="n_head"),
        **common.ROPE,
        **common.RMS_EPS,
        **common.HEAD_DIM,
        **common.FILE_TYPE,
        "n_vocab": Hparam(Keys.LLM.VOCAB_SIZE, ("vocab_size",)),
        "n_rot": Hparam(Keys.Rope.DIMENSION_COUNT, (), default="head_dim"),
        "llama3_factor": Hparam("", ("rope.factor",), FLOAT, default=8.0, when=_LLAMA3),
        "llama3_low": Hparam("", ("rope.low_freq_factor",), FLOAT, default=1.0, when=_LLAMA3),
        "llama3_high": Hparam("", ("rope.high_freq_factor",), FLOAT, default=4.0, when=_LLAMA3),
        "llama3_original": Hparam("", ("rope.original",), default=8192, when=_LLAMA3),
        **common.tied(default=False),
        **common.flag("attention_bias", "attention_bias", default=False),
        **common.flag("mlp_bias", "mlp_bias", default=False),
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
    fixed={"hidden_act": ("silu",), "rope.type": (*common.ROPE_TYPES, "llama3")},
    computed=_rope_freqs,
    vocabulary="llama",
)
# Its sliding window is not in llama.cpp's graph: beyond it, the first version of Mistral attends to more than it should.
MISTRAL = replace(
    LLAMA, hparams={**LLAMA.hparams, "n_head_kv": replace(common.SIZES["n_head_kv"], default=8)}
)
