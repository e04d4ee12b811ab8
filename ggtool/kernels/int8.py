"""Products with an int8 matrix that has one float32 scale per row: W = codes * scales[:, None].

The product is computed in float32 whatever the activations are: int8 widens to float32 exactly and the
scales go on the sums, so nothing is rounded that a float32 product would not round. torch's own
`_weight_int8pack_mm` is not used: in bfloat16 it rounds activations, scales and results (relative error 3e-3,
measured), and in float32 it runs a scalar loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Float32 bytes of codes widened at once. Small enough for a last-level cache, large enough that starting the
# threads for each panel costs little: for one token, 1 MiB and whole matrices both took twice as long.
PANEL_BYTES = 4 << 20


def matmul(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`, for a W that is never whole.

    x: float (..., columns). codes: int8 (rows, columns). scales: float32 (rows,). bias: float (rows,).
    Inference only: no gradient flows.
    """
    n_rows, n_columns = codes.shape
    flat = x.reshape(-1, n_columns).to(torch.float32)
    sums = flat.new_empty(len(flat), n_rows)
    step = max(1, PANEL_BYTES // (4 * n_columns))
    for start in range(0, n_rows, step):
        panel = codes[start : start + step].to(torch.float32)
        torch.mm(flat, panel.t(), out=sums[:, start : start + step])
    y = sums.mul_(scales) if bias is None else torch.addcmul(bias.to(torch.float32), sums, scales)
    return y.to(x.dtype).reshape(*x.shape[:-1], n_rows)


def matmul_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `matmul` stands for, in float64 with the whole matrix widened. For tests."""
    weight = codes.double() * scales.double()[:, None]
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


def gather(indices: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return rows of W in float32: integer `indices` (...) to (..., columns)."""
    return codes[indices].to(torch.float32) * scales[indices].unsqueeze(-1)
