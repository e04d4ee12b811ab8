"""One door to the compiled products of packed matrices: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

from torch import Tensor

from ggtool.kernels import gpu, native
from ggtool.kernels.form import Form


def matmul(
    form: Form | None,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
) -> Tensor | None:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`; None where neither serves.

    form, codes, scales: W as its quantizer packs it. shape: (rows, columns) of W. bias: float (rows,).
    """
    if codes.is_cuda:
        return gpu.matmul(form, x, codes, scales, shape, bias)
    return native.matmul(form, x, codes, scales, shape, bias)
