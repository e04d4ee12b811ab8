"""compressed-tensors (LLM Compressor, vLLM): whole numbers of 1 to 8 bits packed or not, or FP8, in four layouts.

    pack-quantized                      weight_packed (n_out, n_in * bits / 32) int32, weight_shape (2,), weight_scale,
                                        weight_zero_point packed along the outputs, weight_g_idx
    int-, float-, naive-quantized       weight int8 or F8, weight_scale, weight_zero_point

A weight is scale * (number - zero point), with one scale for the matrix, a row, a group of inputs, or a block.
Source: compressed-tensors 0.20, compressors/*/base.py and quantization/lifecycle/forward.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ggtool.errors import SourceError
from ggtool.source.quantized.fp8 import FLOAT8
from ggtool.source.quantized.tensor import (
    ComputedTensor,
    Floats,
    Found,
    Numbers,
    block_scales,
    check_scales,
    check_shape,
    computed,
    rounded,
    take,
    take_parts,
    unpack,
)
from ggtool.source.safetensors import LazyTensor, widen

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SCALES = ("F16", "BF16", "F32")
_STATISTICS = (
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_zero_point",
    ".v_zero_point",
)


@dataclass(frozen=True)
class _Group:
    """How the weights of some modules are held."""

    targets: tuple[str, ...]
    format: str
    bits: int
    symmetric: bool
    group_size: int
    block: tuple[int, int] | None

    def takes(self, module: str) -> bool:
        return any(
            re.match(target[3:], module) is not None
            if target.startswith("re:")
            else target in (module, "Linear")
            for target in self.targets
        )


def find(settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found:
    """Find every `NAME.weight_packed` and every `NAME.weight_scale`."""
    groups = _groups(settings)
    weights, consumed = {}, set[str]()
    statistics = {name for name in tensors if name.endswith(_STATISTICS)}
    kinds = set[str]()
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix(".weight_scale")
        group = _group_of(module, groups)
        read = _packed if group.format == "pack-quantized" else _plain
        weight, used = read(module + ".", tensors, group)
        weights[module + ".weight"] = weight
        consumed |= used
        kinds.add(f"{group.format}, {group.bits} bits")
    dropped = "; scales of activations are left out" if statistics else ""
    return Found(
        f"compressed-tensors {'; '.join(sorted(kinds))}", weights, frozenset(consumed | statistics), dropped
    )


def _groups(settings: Mapping[str, Any]) -> list[_Group]:
    groups = settings.get("config_groups")
    if (
        settings.get("sparsity_config") not in (None, {})
        and settings["sparsity_config"].get("format") != "dense"
    ):
        raise SourceError("config.json has a sparse layout (sparsity_config), which ggtool does not read.")
    if settings.get("transform_config") not in (None, {}):
        raise SourceError(
            "config.json has a transform_config: its weights are rotated, which ggtool does not undo."
        )
    try:
        assert isinstance(groups, dict)
        found = [_group(group, settings) for group in groups.values() if group.get("weights")]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        raise SourceError("config.json has damaged config_groups in its quantization_config.") from None
    for group in found:
        if group.format not in _FORMATS:
            raise SourceError(
                f"config.json has the compressed-tensors format {group.format!r}; ggtool reads {', '.join(_FORMATS)}."
            )
    return found


def _group(group: Mapping[str, Any], settings: Mapping[str, Any]) -> _Group:
    weights = group["weights"]
    block = weights.get("block_structure")
    if isinstance(block, str):  # "128x128", as it was first written
        block = [int(part) for part in block.split("x")]
    bits = int(weights.get("num_bits", 8))
    if not 1 <= bits <= 8:
        raise ValueError
    return _Group(
        targets=tuple(str(target) for target in group["targets"]),
        format=str(group.get("format") or settings.get("format")),
        bits=bits,
        symmetric=bool(weights.get("symmetric", True)),
        group_size=int(weights.get("group_size") or 0),
        block=(max(1, int(block[0])), max(1, int(block[1]))) if block else None,
    )


def _group_of(module: str, groups: list[_Group]) -> _Group:
    for group in groups:
        if group.takes(module):
            return group
    raise SourceError(f"config.json has no config group for {module}, whose weight is packed.")


def _block(group: _Group, n_out: int, n_in: int) -> tuple[int, int]:
    if group.block:
        return group.block
    return (1, group.group_size) if group.group_size > 0 else (max(1, n_out), max(1, n_in))


def _packed(prefix: str, tensors: Mapping[str, LazyTensor], group: _Group) -> tuple[ComputedTensor, set[str]]:
    wanted = {
        "weight_packed": ("I32",),
        "weight_scale": _SCALES,
        "weight_shape": ("I64", "I32"),
        "weight_zero_point": ("I32", "I8"),
        "weight_g_idx": ("I32", "I64"),
    }
    optional = ("weight_g_idx", "weight_zero_point") if group.symmetric else ("weight_g_idx",)
    parts = take_parts(tensors, prefix, wanted, optional)
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    check_shape(parts["weight_shape"], (2,))
    n_out, n_in = (int(n) for n in parts["weight_shape"].raw)
    check_shape(packed, (n_out, -(-n_in * group.bits // 32)))
    block = _block(group, n_out, n_in)
    check_scales(scales, n_out, n_in, block)
    n_groups = scales.shape[1] if scales.raw.ndim == 2 else 1
    zeros = parts.get("weight_zero_point")
    if zeros is not None and zeros.dtype == "I32":
        check_shape(zeros, (-(-n_out * group.bits // 32), n_groups))
    elif zeros is not None:
        check_scales(zeros, n_out, n_in, block)
    columns = _columns(parts.get("weight_g_idx"), n_in, n_groups)
    offset = 1 << (group.bits - 1)

    def compute(numbers: Numbers) -> Floats:
        codes = unpack(take(packed.raw, numbers), group.bits, n_in).astype(np.float32) - offset
        if zeros is not None and zeros.dtype == "I32":
            points = unpack(zeros.raw.T, group.bits, n_out).T.astype(np.float32) - offset  # (n_out, n_groups)
            codes -= (
                np.repeat(take(points, numbers), block[1], axis=1)[:, :n_in]
                if columns is None
                else (take(points, numbers)[:, columns])
            )
        elif zeros is not None:
            codes -= block_scales(zeros, numbers, n_out, n_in, block)
        if columns is not None:
            return rounded(codes * widen(take(scales.raw, numbers), scales.dtype)[:, columns], scales.dtype)
        return rounded(codes * block_scales(scales, numbers, n_out, n_in, block), scales.dtype)

    return computed(prefix + "weight", (n_out, n_in), parts, compute), {prefix + part for part in parts}


def _columns(
    g_idx: LazyTensor | None, n_in: int, n_groups: int
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Return the group of each input where they are not in order; -1 throughout stands for in order."""
    if g_idx is None or not g_idx.raw.size or g_idx.raw.min() < 0:
        return None
    check_shape(g_idx, (n_in,))
    if g_idx.raw.max() >= n_groups:
        raise SourceError(f"{g_idx.file}: {g_idx.name} names groups beyond the {n_groups} there are.")
    return np.ascontiguousarray(g_idx.raw, np.int64)


def _plain(prefix: str, tensors: Mapping[str, LazyTensor], group: _Group) -> tuple[ComputedTensor, set[str]]:
    wanted = {
        "weight": ("I8", *FLOAT8),
        "weight_scale": _SCALES,
        "weight_zero_point": ("I8", "F32", "F16", "BF16", *FLOAT8),
    }
    parts = take_parts(tensors, prefix, wanted, ("weight_zero_point",) if group.symmetric else ())
    weight, scales, zeros = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    if weight.raw.ndim != 2:
        raise SourceError(f"{weight.file}: {weight.name} has the shape {weight.shape} and is no matrix.")
    n_out, n_in = weight.shape
    block = _block(group, n_out, n_in)
    check_scales(scales, n_out, n_in, block)
    if zeros is not None:
        check_scales(zeros, n_out, n_in, block)

    def compute(numbers: Numbers) -> Floats:
        codes = widen(take(weight.raw, numbers), weight.dtype)
        if zeros is not None:
            codes = codes - block_scales(zeros, numbers, n_out, n_in, block)
        return rounded(codes * block_scales(scales, numbers, n_out, n_in, block), scales.dtype)

    return computed(prefix + "weight", (n_out, n_in), parts, compute), {prefix + part for part in parts}
