"""A LoRA adapter's folder as peft saves it, and its base model with the adapter merged into the weights.

    read_adapter(folder)               the pairs of matrices, by the weight of the base they belong to
    merged(adapter, config, tensors)   the base's tensors, adapted ones computed row by row when they are read

An adapted weight is W + scale * B @ A with A (rank, n_in), B (n_out, rank) and scale = alpha / rank, or
alpha / sqrt(rank) where the adapter says so (rsLoRA). Source: peft 0.21, tuners/lora/{config,layer}.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggtool.errors import SourceError
from ggtool.source.quantized.tensor import ComputedTensor, Floats, Numbers, computed, is_conv1d, take
from ggtool.source.safetensors import FLOAT_TYPES, LazyTensor, open_file, widen
from ggtool.system.files import read_json

ADAPTER_NAMES = CONFIG_NAME, WEIGHTS_NAME = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Settings that change what is computed in ways that neither a merge of two matrices nor a GGUF adapter has.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its own (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "target_parameters": "adapted parameters of experts (target_parameters)",
}


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one weight: A (rank, n_in), B (n_out, rank), and what their product is multiplied by."""

    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def rank(self) -> int:
        """The length they share."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter: its folder, the base that its config names, its alpha, and its pairs by the base's weight."""

    folder: Path
    base: str
    alpha: float
    pairs: Mapping[str, LoraPair]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").exists()


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter; SourceError for another kind than LoRA, for parts that a LoRA has not, for damaged files."""
    config = read_json(folder / CONFIG_NAME)
    where = folder / CONFIG_NAME
    if config.get("peft_type", "LORA") != "LORA":
        raise SourceError(f"{where} is of the kind {config.get('peft_type')!r}, and ggtool reads LORA.")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise SourceError(
                f"{where} has {what}, which ggtool does not read; merge the adapter with peft first."
            )
    if not (folder / WEIGHTS_NAME).exists():
        raise SourceError(f"{folder} has no {WEIGHTS_NAME}; save the adapter with safe_serialization.")
    tensors = {tensor.name: tensor for tensor in open_file(folder / WEIGHTS_NAME)}
    pairs: dict[str, LoraPair] = {}
    for name, tensor in tensors.items():
        if not name.endswith((_A, _B)):
            raise SourceError(
                f"{tensor.file} has {name}, which is no matrix of a LoRA; merge it with peft first."
            )
        if name.endswith(_A):
            other = tensors.get(name.removesuffix(_A) + _B)
            if other is None:
                raise SourceError(f"{tensor.file} has {name} without its {_B.strip('.')}.")
            module = name.removesuffix(_A).removeprefix(_PREFIX)
            pairs[module + ".weight"] = _pair(tensor, other, module, config, where)
    if len(tensors) != 2 * len(pairs) or not pairs:
        raise SourceError(
            f"{folder / WEIGHTS_NAME} has no pairs of lora_A and lora_B, or only halves of some."
        )
    return Adapter(
        folder, str(config.get("base_model_name_or_path") or ""), _number(config, "lora_alpha", where), pairs
    )


def merged(
    adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the base's tensors with the adapter in them; SourceError names a weight that the base has not."""
    found = dict(tensors)
    for module, pair in adapter.pairs.items():
        name = base_name(module, tensors)
        if name is None:
            raise SourceError(f"{adapter.folder} adapts {module}, which its base model has not.")
        found[name] = _merge(tensors[name], pair, config)
    return found


def base_name(module: str, names: Mapping[str, Any]) -> str | None:
    """Return the name that an adapted weight has in a checkpoint, which may lack the outermost module's."""
    for name in (module, module.partition(".")[2]):
        if name in names:
            return name
    return None


def _pair(a: LazyTensor, b: LazyTensor, module: str, config: Mapping[str, Any], where: Path) -> LoraPair:
    for tensor in (a, b):
        if tensor.raw.ndim != 2 or tensor.dtype not in FLOAT_TYPES:
            raise SourceError(f"{tensor.file}: {tensor.name} is no matrix of floats.")
    rank = a.shape[0]
    if b.shape[1] != rank or not rank:
        raise SourceError(f"{a.file}: {a.name} {a.shape} and {b.name} {b.shape} share no rank.")
    alpha = _number(config, "lora_alpha", where)
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module) and type(value) in (int, float):
                alpha = float(value)
                break
        except re.error:
            raise SourceError(f"{where} has the alpha_pattern {pattern!r}, which is no expression.") from None
    return LoraPair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _number(config: Mapping[str, Any], key: str, where: Path) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SourceError(f"{where} has {key} = {value!r}, which is no number.")
    return float(value)


def _merge(base: LazyTensor, pair: LoraPair, config: Mapping[str, Any]) -> ComputedTensor:
    n_out, n_in = pair.b.shape[0], pair.a.shape[1]
    turned = is_conv1d(base.name, config)
    if base.shape != ((n_in, n_out) if turned else (n_out, n_in)):
        raise SourceError(
            f"{pair.a.file}: {pair.a.name} adapts a weight of {n_out} x {n_in}, and {base.name} is {base.shape}."
        )
    if base.dtype not in FLOAT_TYPES:
        raise SourceError(f"{base.file}: {base.name} is made of {base.dtype} and cannot be adapted.")

    def compute(numbers: Numbers) -> Floats:
        if isinstance(base, ComputedTensor):
            rows = base.rows(numbers)
        else:
            stored = base.raw.T if turned else base.raw
            rows = widen(take(stored, numbers), base.dtype)
        delta: Floats = widen(take(pair.b.raw, numbers), pair.b.dtype) @ pair.a.float32()
        return rows + np.float32(pair.scale) * delta

    weight = computed(base.name, (n_out, n_in), {"base": base, "a": pair.a, "b": pair.b}, compute)
    return weight.turned() if turned else weight
