"""AWQ: 4 bits, packed along the outputs in an order of its own, a scale and a zero point a group of inputs.

    qweight (n_in, n_out / 8) int32    qzeros (n_groups, n_out / 8) int32    scales (n_groups, n_out)

A weight is scale * (number - zero point); nibble i of a word holds the output 8 * word + ORDER[i]. The scaling of
activations that AWQ chose is in the norms before each matrix, which are floats.
Source: AutoAWQ, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

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
from ggtool.source.safetensors import LazyTensor, widen

_BITS, _PER_WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = np.array([_BITS * _ORDER.index(column) for column in range(_PER_WORD)], np.int32)
_PARTS = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32")}


def find(settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> Found:
    """Find every `NAME.qweight`."""
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if bits != _BITS:
        raise SourceError(f"config.json has AWQ weights of {bits!r} bits; ggtool reads {_BITS}.")
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if version != "gemm":
        raise SourceError(f"config.json has the AWQ layout {version!r}; ggtool reads gemm.")
    weights, consumed = {}, set[str]()
    for name in tensors:
        if name.endswith(".qweight"):
            prefix = name.removesuffix("qweight")
            parts = take_parts(tensors, prefix, _PARTS)
            weights[prefix + "weight"] = _weight(prefix + "weight", parts)
            consumed |= {prefix + part for part in parts}
    return Found(f"AWQ, {_BITS} bits", weights, frozenset(consumed))


def _weight(name: str, parts: Mapping[str, LazyTensor]) -> ComputedTensor:
    qweight, qzeros, scales = (parts[part] for part in _PARTS)
    if qweight.raw.ndim != 2 or scales.raw.ndim != 2 or not scales.shape[0]:
        raise SourceError(f"{qweight.file}: {qweight.name} and its scales are not matrices.")
    n_in, n_out, n_groups = qweight.shape[0], qweight.shape[1] * _PER_WORD, scales.shape[0]
    check_shape(scales, (n_groups, n_out))
    check_shape(qzeros, (n_groups, n_out // _PER_WORD))
    if n_in % n_groups:
        raise SourceError(f"{scales.file}: {n_in} inputs of {name} do not fall into {n_groups} groups.")

    def compute(numbers: Numbers) -> Floats:
        codes, zeros = (
            _columns(qweight.raw, numbers),
            _columns(qzeros.raw, numbers),
        )  # (rows, n_in), (rows, groups)
        factors = widen(take(scales.raw, numbers, 1).T, scales.dtype)
        per_group = codes.reshape(len(numbers), n_groups, -1) - zeros[:, :, None]
        return rounded(
            (per_group.astype(np.float32) * factors[:, :, None]).reshape(len(numbers), n_in), scales.dtype
        )

    return computed(name, (n_out, n_in), parts, compute)


def _columns(words: npt.NDArray[Any], numbers: Numbers) -> npt.NDArray[np.int32]:
    """Unpack some of the outputs, as rows; the words between the first and the last of them are read."""
    if not len(numbers):
        return np.empty((0, words.shape[0]), np.int32)
    first, last = int(numbers.min()) // _PER_WORD, int(numbers.max()) // _PER_WORD
    part = words[:, first : last + 1].astype(np.int32)
    nibbles = (part[:, :, None] >> _SHIFTS) & 0xF  # (n_in, words, 8)
    return np.ascontiguousarray(take(nibbles.reshape(len(words), -1).T, numbers - first * _PER_WORD))
