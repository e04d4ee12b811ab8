"""Detect whether a checkpoint is quantized, by its tensors rather than by a config.json that may be out of date."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ggtool.source.safetensors import LazyTensor

CONFIG_KEY = "quantization_config"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Causal masks that old checkpoints keep as bytes.
_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
# What quantizers keep beside the codes: scales, tables, states.
_PARTS = (
    "absmax",
    "quant_map",
    "quant_state",
    "SCB",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_scale_inv",
    "weight_packed",
)


def quantization(
    config: Mapping[str, Any], tensors: Iterable[LazyTensor]
) -> Literal["", "left over", "quantized"]:
    """Return "" without a quantization_config, "quantized" if the tensors are, "left over" if they are plain floats."""
    if config.get(CONFIG_KEY) is None:
        return ""
    for tensor in tensors:
        parts = tensor.name.split(".")
        if tensor.dtype not in _FLOATS and not tensor.name.endswith(_MASKS):
            return "quantized"
        if any(part in parts for part in _PARTS):
            return "quantized"
    return "left over"


def left_over_note(config: Mapping[str, Any]) -> str:
    """Return the note for a quantization_config that no longer describes the weights."""
    settings = config[CONFIG_KEY]
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return (
        f"config.json has a quantization_config ({method or 'without a method'}), but the weights are floats: it was left "
        "over and is ignored."
    )
