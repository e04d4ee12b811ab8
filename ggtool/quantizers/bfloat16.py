"""Weights in bfloat16, products and activations in float32.

Shows what rounding the weights alone to 16 bits costs; `hf-bf16` also computes in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.kernels.form import BFLOAT16, Form
from ggtool.quantizers import QuantizedTensor, Quantizer
from ggtool.quantizers.base import WidenedByPanels

# bfloat16's largest number, as float32 bits; rounding saturates there.
_MAX_BITS = 0x7F7F0000
_SIGN = -0x80000000
_HALF = 0x7FFF


class BFloat16(WidenedByPanels):
    """codes: int16 (rows, columns), the upper halves. scales: none, float32 (rows, 0)."""

    @property
    def for_tables(self) -> Quantizer:
        """The same: 16 bits everywhere."""
        return self

    @property
    def form(self) -> Form:
        """Upper halves."""
        return BFLOAT16

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the rounded upper halves of a finite `weight` (rows, columns)."""
        bits = weight.to(torch.float32).contiguous().view(torch.int32)
        sign = bits & _SIGN
        magnitude = (bits & ~_SIGN).clamp(max=_MAX_BITS)
        is_odd = (magnitude >> 16) & 1
        upper = (magnitude + _HALF + is_odd) >> 16
        codes = (upper | (sign >> 16)).to(torch.int16)
        scales = torch.empty(len(weight), 0, dtype=torch.float32, device=weight.device)
        return QuantizedTensor(codes, scales, (weight.shape[0], weight.shape[1]))

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for, exactly."""
        return (quantized.codes.to(torch.int32) << 16).view(torch.float32)
