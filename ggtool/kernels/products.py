"""One door to the compiled products of packed matrices: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

from torch import Tensor

from ggtool.kernels import gpu, native
from ggtool.kernels.form import Operand


def matmul(x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor | None:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`; None where neither serves.

    bias: float (rows,). Inference only: with a gradient to keep, neither serves.
    """
    return gpu.matmul(x, w, bias) if w.codes.is_cuda else native.matmul(x, w, bias)
