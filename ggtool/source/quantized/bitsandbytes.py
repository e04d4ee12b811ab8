"""bitsandbytes: LLM.int8 with a scale a row, or FP4 / NF4 with a scale for each block of the flattened matrix.

    8 bits: weight (n_out, n_in) int8, SCB (n_out,): a weight is number * SCB / 127
    4 bits: weight uint8, two numbers a byte, the first in the upper half; weight.absmax, one for each block;
            weight.quant_map (16,); weight.quant_state.bitsandbytes__nf4 or __fp4: JSON (shape, blocksize, dtype).
            Doubly quantized: absmax is uint8 with a map, blocks and an offset of its own (nested_*)

Source: bitsandbytes 0.50, functional.py (QuantState) and backends/default/ops.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ggtool.errors import SourceError
from ggtool.source.quantized.tensor import (
    ComputedTensor,
    Floats,
    Found,
    Numbers,
    check_shape,
    computed,
    rounded,
    take,
    take_parts,
)
from ggtool.source.safetensors import LazyTensor

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# In the order and with the constant of int8_vectorwise_dequant.
_ONE_127TH = np.float32(7.874015718698502e-3)
_FOUR = {
    "weight": ("U8",),
    "weight.absmax": ("F32", "U8"),
    "weight.quant_map": ("F32",),
    "weight.nested_absmax": ("F32",),
    "weight.nested_quant_map": ("F32",),
}
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def find(_settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found:
    """Find every `NAME.SCB` and every quant_state."""
    weights, consumed, kinds = {}, set[str](), set[str]()
    for name, tensor in tensors.items():
        if name.endswith(".SCB"):
            prefix = name.removesuffix("SCB")
            parts = take_parts(tensors, prefix, {"weight": ("I8",), "SCB": ("F32",)})
            weights[prefix + "weight"] = _int8(
                prefix + "weight", parts, tensors.get(prefix + "weight_format")
            )
            consumed |= {prefix + part for part in (*parts, "weight_format")}
            kinds.add("int8")
        elif _STATE in name:
            prefix, _, kind = name.partition(_STATE)
            if kind not in _KINDS:
                raise SourceError(
                    f"{tensor.file}: {name} is of the kind {kind!r}; ggtool reads {' and '.join(_KINDS)}."
                )
            parts = take_parts(tensors, prefix, _FOUR, optional=_NESTED)
            weights[prefix + "weight"] = _four_bits(prefix + "weight", parts, tensor)
            consumed |= {name, *(prefix + part for part in parts)}
            kinds.add(kind)
    return Found(f"bitsandbytes {', '.join(sorted(kinds))}", weights, frozenset(consumed))


def _int8(name: str, parts: Mapping[str, LazyTensor], layout: LazyTensor | None) -> ComputedTensor:
    weight, scales = parts["weight"], parts["SCB"]
    if layout is not None and layout.raw.any():
        raise SourceError(
            f"{weight.file}: {name} is laid out for one kind of GPU (weight_format); save it row by row."
        )
    if weight.raw.ndim != 2:
        raise SourceError(f"{weight.file}: {name} has the shape {weight.shape} and is no matrix.")
    check_shape(scales, (weight.shape[0],))

    def compute(numbers: Numbers) -> Floats:
        codes = take(weight.raw, numbers).astype(np.float32)
        values: Floats = codes * take(scales.raw, numbers)[:, None] * _ONE_127TH
        return values

    n_out, n_in = weight.shape
    return computed(name, (n_out, n_in), parts, compute)


def _four_bits(name: str, parts: Mapping[str, LazyTensor], state: LazyTensor) -> ComputedTensor:
    weight, absmax, quant_map = (parts[part] for part in ("weight", "weight.absmax", "weight.quant_map"))
    facts = _facts(state)
    n_out, n_in = facts["shape"]
    block, dtype = facts["blocksize"], facts["dtype"]
    if weight.n_params != -(-n_out * n_in // 2):
        raise SourceError(
            f"{weight.file}: {name} has {weight.n_params} bytes, too few or too many for {n_out} x {n_in}."
        )
    check_shape(quant_map, (16,))
    n_blocks = -(-n_out * n_in // block)
    if absmax.n_params != n_blocks or (absmax.dtype == "U8") != (_NESTED[0] in parts):
        raise SourceError(f"{weight.file}: {absmax.name} does not fit {n_blocks} blocks of {block}.")
    if absmax.dtype == "U8":
        check_shape(parts[_NESTED[0]], (-(-n_blocks // facts["nested_blocksize"]),))
        check_shape(parts[_NESTED[1]], (256,))
    packed, codes = weight.raw.reshape(-1), np.array(quant_map.raw)

    def scales(first: int, last: int) -> Floats:
        if absmax.dtype == "F32":
            return np.array(absmax.raw.reshape(-1)[first:last])
        outer = np.arange(first, last) // facts["nested_blocksize"]
        inner = parts[_NESTED[1]].raw[absmax.raw.reshape(-1)[first:last]]
        unpacked: Floats = inner * parts[_NESTED[0]].raw[outer] + np.float32(facts["nested_offset"])
        return unpacked

    def compute(numbers: Numbers) -> Floats:
        out = np.empty((len(numbers), n_in), np.float32)
        if not len(numbers):
            return out
        begin = int(numbers.min()) * n_in
        end = (int(numbers.max()) + 1) * n_in  # all rows between are unpacked: blocks do not end with rows
        data = packed[begin // 2 : -(-end // 2)]
        nibbles = np.stack([data >> 4, data & 0xF], axis=-1).reshape(-1)[begin % 2 :][: end - begin]
        first, last = begin // block, -(-end // block)
        each = np.repeat(scales(first, last), block)[begin - first * block :][: end - begin]
        values = rounded(codes[nibbles] * each, dtype).reshape(-1, n_in)
        out[:] = values[numbers - numbers.min()]
        return out

    return computed(name, (n_out, n_in), {**parts, "state": state}, compute)


def _facts(state: LazyTensor) -> dict[str, Any]:
    try:
        facts = json.loads(state.raw.tobytes())
        n_out, n_in = (int(n) for n in facts["shape"])
        block, nested = int(facts["blocksize"]), int(facts.get("nested_blocksize", 1))
        offset, dtype = float(facts.get("nested_offset", 0.0)), _DTYPES[facts["dtype"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise SourceError(f"{state.file}: {state.name} is damaged, or describes no matrix.") from None
    if min(n_out, n_in, block, nested) < 1 or n_out * n_in > 1 << 48 or not math.isfinite(offset):
        raise SourceError(f"{state.file}: {state.name} describes an impossible weight of {n_out} x {n_in}.")
    return {
        "shape": (n_out, n_in),
        "blocksize": block,
        "dtype": dtype,
        "nested_blocksize": nested,
        "nested_offset": offset,
    }
