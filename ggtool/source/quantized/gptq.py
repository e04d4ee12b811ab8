"""GPTQ (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits, packed along the inputs, a scale and a zero point a group of inputs.

    qweight (n_in * bits / 32, n_out) int32      qzeros (n_groups, n_out * bits / 32) int32
    scales (n_groups, n_out)                     g_idx (n_in,): the group of each input

A weight is scale * (number - zero point). Files of the first format hold each zero point less one.
Source: GPTQModel, gptqmodel/nn_modules/qlinear.
"""

from __future__ import annotations

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
    unpack,
)
from ggtool.source.safetensors import LazyTensor, widen

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # format -> what its zero points are stored less
_SCALES = ("F16", "BF16", "F32")
_PARTS = {"qweight": ("I32",), "qzeros": ("I32",), "scales": _SCALES, "g_idx": ("I32", "I64")}


def find(settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found:
    """Find every `NAME.qweight`."""
    bits, kind = settings.get("bits"), settings.get("checkpoint_format", settings.get("format", "gptq"))
    if bits not in _BITS:
        raise SourceError(f"config.json has GPTQ weights of {bits!r} bits; ggtool reads {_BITS}.")
    if kind not in _FORMATS:
        raise SourceError(f"config.json has the GPTQ format {kind!r}; ggtool reads {' and '.join(_FORMATS)}.")
    if settings.get("dynamic"):
        raise SourceError(
            "config.json has GPTQ settings that differ by module (dynamic), which ggtool does not read."
        )
    weights, consumed = {}, set[str]()
    for name in tensors:
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            parts = take_parts(tensors, prefix, _PARTS, optional=("g_idx",))
            weights[prefix + "weight"] = _weight(prefix + "weight", parts, bits, _FORMATS[kind])
            consumed |= {prefix + part for part in parts}
    return Found(f"GPTQ, {bits} bits", weights, frozenset(consumed))


def _weight(name: str, parts: Mapping[str, LazyTensor], bits: int, less: int) -> ComputedTensor:
    qweight, qzeros, scales = (parts[part] for part in ("qweight", "qzeros", "scales"))
    if qweight.raw.ndim != 2 or scales.raw.ndim != 2 or not scales.shape[0]:
        raise SourceError(f"{qweight.file}: {qweight.name} and its scales are not matrices.")
    n_out, n_groups = qweight.shape[1], scales.shape[0]
    n_in = qweight.shape[0] * 32 // bits
    check_shape(scales, (n_groups, n_out))
    check_shape(qzeros, (n_groups, -(-n_out * bits // 32)))
    if "g_idx" in parts:
        check_shape(parts["g_idx"], (n_in,))
        groups = np.ascontiguousarray(parts["g_idx"].raw, np.int64)
        if groups.size and not (groups.min() >= 0 and groups.max() < n_groups):
            raise SourceError(
                f"{qweight.file}: {parts['g_idx'].name} names groups beyond the {n_groups} there are."
            )
    else:
        groups = np.arange(n_in) // -(-n_in // n_groups)

    def compute(numbers: Numbers) -> Floats:
        codes = unpack(take(qweight.raw, numbers, 1).T, bits, n_in)  # (rows, n_in)
        zeros = (
            take(unpack(qzeros.raw, bits, n_out), numbers, 1).T.astype(np.int32) + less
        )  # (rows, n_groups)
        factors = widen(take(scales.raw, numbers, 1).T, scales.dtype)
        steps = (codes.astype(np.int32) - zeros[:, groups]).astype(np.float32)
        return rounded(factors[:, groups] * steps, scales.dtype)

    return computed(name, (n_out, n_in), parts, compute)
