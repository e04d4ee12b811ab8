"""Base class of formats that are restored a few rows at a time: product, gather, and int8 tables."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ggtool.kernels import panels, products
from ggtool.kernels.form import Form, Operand
from ggtool.quantizers import QuantizedTensor, Quantizer
from ggtool.quantizers.absmax import Int8PerChannel


class WidenedByPanels(ABC):
    """A Quantizer that implements quantize and dequantize; product and gather follow from restoring some rows."""

    @property
    def for_tables(self) -> Quantizer:
        """Int8 per row: an output head below 8 bits loses more accuracy than its size is worth."""
        return Int8PerChannel()

    @property
    def form(self) -> Form | None:
        """The packed-layout descriptor for the compiled products; None where they do not support the format."""
        return None

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for a finite `weight` (rows, columns)."""

    @abstractmethod
    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return `weight` (rows, columns) quantized and restored, float32."""
        return self.dequantize(self.quantize(weight))

    def matmul(self, x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`."""
        if self.form is not None:
            operand = Operand(self.form, quantized.codes, quantized.scales, quantized.shape)
            y = products.matmul(x, operand, bias)
            if y is not None:
                return y
        return panels.matmul(x, quantized.shape, lambda rows: self.dequantize(quantized.rows(rows)), bias)

    def gather(self, indices: Tensor, quantized: QuantizedTensor) -> Tensor:
        """Return rows of W in float32, (...) to (..., columns)."""
        rows = self.dequantize(quantized.rows(indices.reshape(-1)))
        return rows.reshape(*indices.shape, quantized.shape[1])
