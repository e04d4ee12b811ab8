"""Two more int8 schemes: a scale per group of 64, and affine rows between their minimum and maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.kernels.form import INT8_AFFINE, Form, int8_groups
from ggtool.quantizers import QuantizedTensor, Quantizer
from ggtool.quantizers.absmax import MAX_CODE, round_to_int8
from ggtool.quantizers.base import WidenedByPanels
from ggtool.quantizers.groups import pad_columns, row_panels

GROUP = 64
_LAST_CODE = 255
_OFFSET = 128
_GROUPS = int8_groups(GROUP)


class Int8PerGroup(WidenedByPanels):
    """W ~ codes * scale per group of 64 in a row, symmetric: 8.25 bits per weight.

    codes: int8 (rows, groups, 64), the last group zero-padded. scales: float16 (rows, groups).
    """

    @property
    def for_tables(self) -> Quantizer:
        """The same, since table rows divide into groups too."""
        return self

    @property
    def form(self) -> Form:
        """A scale for each group."""
        return _GROUPS

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for a finite `weight` (rows, columns); scales saturate at 65504."""
        n_rows, n_columns = weight.shape
        groups = pad_columns(weight, GROUP).reshape(-1, GROUP)
        largest = torch.linalg.vector_norm(groups, torch.inf, dim=1).to(torch.float32)
        scales = (largest / MAX_CODE).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
        codes = round_to_int8(groups, scales.to(torch.float32)).view(n_rows, -1, GROUP)
        return QuantizedTensor(codes, scales.view(n_rows, -1), (n_rows, n_columns))

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""
        groups = quantized.codes.to(torch.float32).mul_(quantized.scales.to(torch.float32)[..., None])
        return groups.flatten(1)[:, : quantized.shape[1]]


class Int8Affine(WidenedByPanels):
    """W ~ (codes + 128) * step + smallest, per row: 256 codes from a row's smallest weight to its largest.

    codes: int8 (rows, columns). scales: float32 (rows, 2), step and smallest.
    """

    @property
    def for_tables(self) -> Quantizer:
        """The same, since every row of a table has its own step."""
        return self

    @property
    def form(self) -> Form:
        """A step and an offset for each row."""
        return INT8_AFFINE

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for a finite `weight` (rows, columns)."""
        codes, scales = [], []
        for rows in row_panels(weight):
            smallest, largest = rows.aminmax(dim=1, keepdim=True)
            # Divided first, since the span itself may overflow float32.
            steps = largest / _LAST_CODE - smallest / _LAST_CODE
            divisors = torch.where(steps > 0, steps, 1.0)
            above = (rows / divisors - smallest / divisors).round_().clamp_(0, _LAST_CODE)
            codes.append((above - _OFFSET).to(torch.int8))
            scales.append(torch.cat((steps, smallest), 1))
        return QuantizedTensor(torch.cat(codes), torch.cat(scales), (weight.shape[0], weight.shape[1]))

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""
        steps, smallest = quantized.scales[:, :1], quantized.scales[:, 1:]
        return (quantized.codes.to(torch.float32) + _OFFSET).mul_(steps).add_(smallest)
