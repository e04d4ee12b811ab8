"""Products with an int8 matrix that has one float32 scale per row: W = codes * scales[:, None].

int8 widens to float32 exactly and the scales go on the sums, so nothing is rounded that a float32 product
would not round. torch's own `_weight_int8pack_mm` is not used: in bfloat16 it rounds activations, scales and
results (relative error 3e-3, measured), and in float32 it runs a scalar loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.kernels import panels, products
from ggtool.kernels.form import INT8_ROWS, Operand


def matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`, for a W that is never whole.

    x: float (..., columns). codes: int8 (rows, columns). scales: float32 (rows,). bias: float (rows,).
    Inference only: no gradient flows.
    """
    shape = codes.shape[0], codes.shape[1]
    y = products.matmul(x, Operand(INT8_ROWS, codes, scales, shape), bias)
    if y is not None:
        return y
    return panels.matmul(x, shape, lambda rows: codes[rows].to(torch.float32), bias, scales)


def matmul_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `matmul` stands for, in float64 with the whole matrix widened. For tests."""
    weight = codes.double() * scales.double()[:, None]
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def gather(indices: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return rows of W in float32: integer `indices` (...) to (..., columns)."""
    return codes[indices].to(torch.float32) * scales[indices].unsqueeze(-1)
