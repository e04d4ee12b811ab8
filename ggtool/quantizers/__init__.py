"""The Quantizer protocol, and QUANTIZERS: the name in `Format.quantizer` to the code behind it.

A quantizer here is pure: one matrix in, codes and scales out; activations are never touched. The `bnb-*`
rows are bitsandbytes' own, loaded by transformers, and have no Quantizer: see `ggtool.quantizers.bnb`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, device


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix: codes and scales.

    codes: packed integers; their layout is the quantizer's. scales: one or more per row or group.
    Both have one row per row of the matrix.
    shape: of the original matrix, (rows, columns), as in y = x @ W.T.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def rows(self, index: slice | Tensor) -> QuantizedTensor:
        """Return some rows, by slice (no copy) or by a vector of indices."""
        codes = self.codes[index]
        return QuantizedTensor(codes, self.scales[index], (len(codes), self.shape[1]))

    def to(self, device: str | device) -> QuantizedTensor:
        """Return a copy on another device."""
        return QuantizedTensor(self.codes.to(device), self.scales.to(device), self.shape)


class Quantizer(Protocol):
    """Quantize one matrix of shape (out_features, in_features), restore it, and compute with it packed."""

    @property
    def for_tables(self) -> Quantizer:
        """The quantizer for the token table and the output head of a model in this format."""
        ...

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for `weight` (rows, columns), float of any precision."""
        ...

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix that the codes stand for."""
        ...

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return dequantize(quantize(weight)) bit for bit, without necessarily packing in between."""
        ...

    def matmul(self, x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T + bias, (..., columns) to (..., rows), without dequantizing all of W at once."""
        ...

    def gather(self, indices: Tensor, quantized: QuantizedTensor) -> Tensor:
        """Return rows of W by index, (...) to float32 (..., columns)."""
        ...


QUANTIZERS: Mapping[str, str] = MappingProxyType(
    {
        "scratch-bf16": "ggtool.quantizers.bfloat16:BFloat16",
        "scratch-int8": "ggtool.quantizers.absmax:Int8PerChannel",
        "scratch-int8-tensor": "ggtool.quantizers.absmax:Int8PerTensor",
        "scratch-int8-affine": "ggtool.quantizers.int8:Int8Affine",
        "scratch-int8-group": "ggtool.quantizers.int8:Int8PerGroup",
        "scratch-int4": "ggtool.quantizers.tables:INT4",
        "scratch-nf4": "ggtool.quantizers.tables:NF4",
        "scratch-fp4": "ggtool.quantizers.tables:FP4",
        "scratch-iq4": "ggtool.quantizers.tables:IQ4",
        "scratch-nf4-bnb": "ggtool.quantizers.blockwise:NF4",
        "scratch-fp4-bnb": "ggtool.quantizers.blockwise:FP4",
        "scratch-int3": "ggtool.quantizers.tables:INT3",
        "scratch-int2": "ggtool.quantizers.tables:INT2",
        "scratch-ternary": "ggtool.quantizers.ternary:ONE_PLANE",
        "scratch-ternary2": "ggtool.quantizers.ternary:TWO_PLANES",
        "scratch-ternary3": "ggtool.quantizers.ternary:THREE_PLANES",
        "bnb-int8": "ggtool.quantizers.bnb:INT8",
        "bnb-fp4": "ggtool.quantizers.bnb:FP4",
        "bnb-fp4-dq": "ggtool.quantizers.bnb:FP4_DOUBLE_QUANT",
        "bnb-nf4": "ggtool.quantizers.bnb:NF4",
        "bnb-nf4-dq": "ggtool.quantizers.bnb:NF4_DOUBLE_QUANT",
    }
)


def load_attribute(name: str) -> object:
    """Import and return the class that a QUANTIZERS row names."""
    module, _, attribute = QUANTIZERS[name].partition(":")
    found: object = getattr(importlib.import_module(module), attribute)
    return found
