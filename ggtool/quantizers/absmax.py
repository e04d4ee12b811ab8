"""Symmetric int8: the largest absolute weight of a row, or of the whole matrix, becomes 127.

No calibration and no search: at 8 bits the rounding error of a row is about 1e-4 of its power, and clipping
the largest weight to gain less than that is not worth its code. -128 is not used, so that codes are symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.kernels import int8
from ggtool.quantizers import QuantizedTensor, Quantizer

MAX_CODE = 127
# The scale of float32's largest number would round up and restore infinity.
_MAX_SCALE = torch.finfo(torch.float32).max / MAX_CODE * (1 - torch.finfo(torch.float32).eps)
# Elements rounded at once, to bound temporary memory.
_ELEMENTS_AT_ONCE = 1 << 20


class Int8PerChannel:
    """W ~ codes * scale per row; |W - restored| <= scale / 2. An all-zero row has scale 0 and codes 0."""

    @property
    def for_tables(self) -> Quantizer:
        """The same, since every row of a table has its own scale."""
        return self

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return int8 codes (rows, columns) and float32 scales (rows,) for a finite `weight` of that shape."""
        n_rows, n_columns = weight.shape
        scales = self._scales(weight)
        return QuantizedTensor(round_to_int8(weight, scales), scales, (n_rows, n_columns))

    def _scales(self, weight: Tensor) -> Tensor:
        """Return the scale of each row, float32 (rows,)."""
        largest: Tensor = torch.linalg.vector_norm(weight, torch.inf, dim=1)
        return (largest.to(torch.float32) / MAX_CODE).clamp(max=_MAX_SCALE)

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""
        return quantized.codes.to(torch.float32) * quantized.scales[:, None]

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return `weight` (rows, columns) quantized and restored, float32."""
        return self.dequantize(self.quantize(weight))

    def matmul(self, x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`."""
        return int8.matmul(x, quantized.codes, quantized.scales, bias)

    def gather(self, indices: Tensor, quantized: QuantizedTensor) -> Tensor:
        """Return rows of W in float32, (...) to (..., columns)."""
        return int8.gather(indices, quantized.codes, quantized.scales)


class Int8PerTensor(Int8PerChannel):
    """One scale for the whole matrix: the naive scheme, where one outlier makes every other weight coarser."""

    def _scales(self, weight: Tensor) -> Tensor:
        """Return one scale, expanded over all rows without copies."""
        largest: Tensor = torch.linalg.vector_norm(weight, torch.inf)
        return (largest.to(torch.float32) / MAX_CODE).clamp(max=_MAX_SCALE).expand(len(weight))


def round_to_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """Return int8 codes (rows, columns) for float32 scales (rows,)."""
    n_rows, n_columns = weight.shape
    codes = torch.empty(n_rows, n_columns, dtype=torch.int8, device=weight.device)
    # A row of zeros, or one so small that its scale is 0, divides by 1 and rounds to zeros.
    divisors = torch.where(scales > 0, scales, 1.0)[:, None]
    step = max(1, _ELEMENTS_AT_ONCE // n_columns)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        # The scale is rounded too, which could push the largest weight beyond 127.
        steps = (weight[rows].to(torch.float32) / divisors[rows]).round_()
        codes[rows] = steps.clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
    return codes
