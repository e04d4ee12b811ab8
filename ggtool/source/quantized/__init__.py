"""Checkpoints that are quantized already, read as the floats that their own library would compute from them.

    dequantized(config, tensors)    the same checkpoint, its packed weights under their float names

A scheme is a file with one function, `find`, and one line in SCHEMES. Which tensors are packed is read from the
tensors' names, since a config names only the rule; the config says what the names cannot (bits, order of packing).
Nothing is unpacked here: each weight becomes a `ComputedTensor`, whose rows are dequantized when they are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from ggtool.errors import SourceError
from ggtool.source.quantized.left_over import CONFIG_KEY, left_over_note, quantization
from ggtool.source.quantized.tensor import ComputedTensor, Found, is_conv1d
from ggtool.source.safetensors import LazyTensor

__all__ = [
    "SCHEMES",
    "Dequantized",
    "dequantized",
    "left_over_note",
    "plain_config",
    "quantization",
    "quantization_settings",
]

_OLD_KEYS = ("compression_config",)  # what compressed-tensors wrote before 2025

# quantization_config's quant_method -> the module that reads it.
SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "gptq": "ggtool.source.quantized.gptq",
        "awq": "ggtool.source.quantized.awq",
        "bitsandbytes": "ggtool.source.quantized.bitsandbytes",
        "compressed-tensors": "ggtool.source.quantized.compressed_tensors",
        "fp8": "ggtool.source.quantized.fp8",
        "fbgemm_fp8": "ggtool.source.quantized.fp8",
    }
)


class _Scheme(Protocol):
    def find(self, settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found: ...


@dataclass(frozen=True)
class Dequantized:
    """A checkpoint's tensors by their float names, and one sentence about what was packed; empty for none."""

    tensors: Mapping[str, LazyTensor]
    note: str = ""


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization_config of a config.json that one of SCHEMES reads, None for a float checkpoint.

    Raises SourceError for a method that none of them reads.
    """
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in (CONFIG_KEY, *_OLD_KEYS):
            settings = holder.get(key)
            if isinstance(settings, dict) and settings:
                _check_method(_method(settings))
                return settings
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what it says about quantization."""
    keys = (CONFIG_KEY, *_OLD_KEYS)
    plain = {key: value for key, value in config.items() if key not in keys}
    if isinstance(inner := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in keys}
    return plain


def dequantized(config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Dequantized:
    """Put each packed weight's floats in the place of its parts; a float checkpoint is returned as it is.

    Raises SourceError for an unknown scheme, and for parts that are missing or do not fit together.
    """
    settings = quantization_settings(config)
    if settings is None:
        return Dequantized(tensors)
    method = _method(settings)
    scheme: _Scheme = importlib.import_module(SCHEMES[method])
    found = scheme.find(settings, tensors)
    if not found.weights:
        raise SourceError(
            f"config.json says that this checkpoint is quantized ({method}), and none of its tensors are packed; "
            f"take {CONFIG_KEY} out of config.json if they are plain floats."
        )
    kept = {name: tensor for name, tensor in tensors.items() if name not in found.consumed}
    if clash := kept.keys() & found.weights.keys():
        raise SourceError(f"the checkpoint has {min(clash)} twice: packed, and as it is.")
    turned = {name: _as_stored(name, tensor, config) for name, tensor in found.weights.items()}
    files = {tensor.file: number for number, tensor in reversed(list(enumerate(tensors.values())))}
    merged: list[tuple[str, LazyTensor]] = [*kept.items(), *turned.items()]
    merged.sort(key=lambda item: (files[item[1].file], item[0]))  # the checkpoint's own order
    n_matrices = sum(tensor.raw.ndim == 2 for _, tensor in merged)
    return Dequantized(
        dict(merged),
        f"The checkpoint is quantized already ({found.what}, {len(turned)} of {n_matrices} matrices): its weights are "
        f"the dequantized ones, and what was lost then stays lost{found.dropped}.",
    )


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"  # its first configs do not name it
    if method is None and "config_groups" in settings:
        return "compressed-tensors"
    return str(method)


def _check_method(method: str) -> None:
    if method not in SCHEMES:
        raise SourceError(
            f"this checkpoint is quantized already ({method}), which ggtool does not read; it reads "
            f"{', '.join(SCHEMES)}. Convert the original that it was made from."
        )


def _as_stored(name: str, tensor: ComputedTensor, config: Mapping[str, Any]) -> ComputedTensor:
    # Libraries that pack a Conv1D first turn it into a Linear.
    return tensor.turned() if is_conv1d(name, config) else tensor
