"""Qwen 2 (biases on queries, keys and values) and Qwen 3 (norms on queries and keys, heads of any width)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ggtool.conversion.architectures import common
from ggtool.conversion.architectures.architecture import BOOL, Architecture, Hparam, Hparams, RopeKeys, Weight

_DEFAULTS = {
    **common.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_NULLABLE = frozenset({"num_key_value_heads", "sliding_window"})


def _window(hparams: Hparams, settings: Mapping[str, Any]) -> int | None:
    """Return the sliding window of the blocks that have one; None where none has."""
    window = settings["sliding_window"] if settings["use_sliding_window"] else None
    kinds = settings["layer_types"]
    if kinds is None:
        some = window is not None and settings["max_window_layers"] < hparams["n_layer"]
    else:
        some = "sliding_attention" in kinds
    return window if some else None


def _notes(gguf_name: str, hparams: Hparams, settings: Mapping[str, Any]) -> Sequence[str]:
    window = common.window_note(_window(hparams, settings), hparams, gguf_name)
    return [*window, *common.rope_notes(hparams, settings)]


def _qwen2_objection(hparams: Hparams, settings: Mapping[str, Any]) -> str:
    return common.head_objection(hparams, settings) or _objection(hparams, settings)


def _objection(hparams: Hparams, settings: Mapping[str, Any]) -> str:
    kinds = settings["layer_types"]
    if kinds is not None and not set(kinds) <= {"full_attention", "sliding_attention"}:
        return f"layer_types = {kinds!r}"
    return common.plain_rope_objection(hparams, settings)


QWEN2 = Architecture(
    gguf_name="qwen2",
    defaults=_DEFAULTS,
    nullable=_NULLABLE,
    rope=RopeKeys(),
    hparams={
        **common.SIZES,
        **common.ROPE,
        **common.RMS_EPS,
        **common.FILE_TYPE,
        **common.DERIVED_HEAD_DIM,
        **common.VOCAB,
        **common.TIED,
        "qkv_bias": Hparam("", (), BOOL, default=True),
    },
    tensors={
        **common.OUTER,
        **common.in_blocks(
            "model.layers.{}.", {**common.NORMS, **common.projections(bias="qkv_bias"), **common.GATED}
        ),
    },
    activation=("hidden_act", "silu"),
    fixed={"rope.type": common.ROPE_TYPES},
    objection=_qwen2_objection,
    notes=partial(_notes, "qwen2"),
)

QWEN3 = Architecture(
    gguf_name="qwen3",
    # The width of a head is not derived where it is absent: it is 128, whatever the sizes.
    defaults={**_DEFAULTS, "head_dim": 128, "attention_bias": False},
    nullable=_NULLABLE,
    rope=RopeKeys(),
    hparams={
        **common.SIZES,
        **common.ROPE,
        **common.RMS_EPS,
        **common.HEAD_DIM,
        **common.FILE_TYPE,
        **common.VOCAB,
        **common.TIED,
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
    activation=("hidden_act", "silu"),
    fixed={"rope.type": common.ROPE_TYPES, "attention_bias": (False,)},
    objection=_objection,
    notes=partial(_notes, "qwen3"),
)
