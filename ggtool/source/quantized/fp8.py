"""FP8 checkpoints (DeepSeek V3, Qwen3-FP8, fbgemm): E4M3 or E5M2 weights, a scale for each block, row or matrix.

    weight (n_out, n_in) F8    weight_scale_inv (n_out / rows, n_in / columns), or weight_scale

A weight is number * scale: the "inv" in the name is of the factor that was multiplied with when quantizing.
Source: transformers 5.23, integrations/finegrained_fp8.py (Fp8Dequantize) and fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ggtool.errors import SourceError
from ggtool.source.quantized.tensor import (
    ComputedTensor,
    Floats,
    Found,
    Numbers,
    block_scales,
    check_scales,
    computed,
    take,
    take_parts,
)
from ggtool.source.safetensors import LazyTensor, widen

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16")
_NAMES = ("weight_scale_inv", "weight_scale")
# Statistics of activations, which a GGUF's products do not use.
_STATISTICS = (
    ".input_scale",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".input_scale_ub",
)


def find(settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found:
    """Find every F8 weight that has a scale."""
    size = settings.get("weight_block_size")
    weights, consumed, statistics = {}, set[str](), {name for name in tensors if name.endswith(_STATISTICS)}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT8 or not name.endswith(".weight"):
            continue
        prefix = name.removesuffix("weight")
        scale = next((part for part in _NAMES if prefix + part in tensors), _NAMES[0])
        parts = take_parts(tensors, prefix, {"weight": FLOAT8, scale: _SCALES})
        weights[name] = float8_weight(name, parts["weight"], parts[scale], _block(size, parts[scale], tensor))
        consumed |= {prefix + part for part in parts}
    what = "FP8 in blocks of {} x {}".format(*size) if size and _is_block(size) else "FP8"
    dropped = "; scales of activations are left out" if statistics else ""
    return Found(what, weights, frozenset(consumed | statistics), dropped)


def float8_weight(
    name: str, weight: LazyTensor, scales: LazyTensor, block: tuple[int, int]
) -> ComputedTensor:
    """Return `weight` (n_out, n_in) times its scales; SourceError where the two do not fit."""
    if weight.raw.ndim != 2:
        raise SourceError(f"{weight.file}: {name} has the shape {weight.shape} and is no matrix.")
    n_out, n_in = weight.shape
    check_scales(scales, n_out, n_in, block)

    def compute(numbers: Numbers) -> Floats:
        codes = widen(take(weight.raw, numbers), weight.dtype)
        return codes * block_scales(scales, numbers, n_out, n_in, block)

    return computed(name, (n_out, n_in), {"weight": weight, "scales": scales}, compute)


def _is_block(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)


def _block(size: Any, scales: LazyTensor, weight: LazyTensor) -> tuple[int, int]:
    if _is_block(size):
        return size[0], size[1]
    if scales.raw.ndim == 2 and min(scales.shape) > 1:
        raise SourceError(
            f"config.json has weight_block_size = {size!r}, and {scales.name} needs the size of its blocks."
        )
    return max(1, weight.shape[0]), max(1, weight.shape[-1])
