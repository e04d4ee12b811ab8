"""Products with a packed matrix that is widened a panel of rows at a time, whatever its format.

A panel fits a last-level cache and is gone when its part of the product is done, so that neither memory nor
the bus ever carries the matrix in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Float32 bytes widened at once. Small enough for a last-level cache, large enough that starting the threads
# for each panel costs little: for one token, 1 MiB and whole matrices both took twice as long.
PANEL_BYTES = 4 << 20


def matmul(
    x: Tensor,
    shape: tuple[int, int],
    widen: Callable[[slice], Tensor],
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    panel_bytes: int | None = None,
) -> Tensor:
    """Return (x @ W.T) * scales + bias, (..., columns) to (..., rows), in the dtype of `x`.

    The product is computed in float32 whatever the activations are. Inference only: no gradient flows.

    x: float (..., columns). shape: (rows, columns) of W. widen: a slice of rows to W[rows] in float32.
    scales: float32 (rows,), if `widen` leaves them to the sums. bias: float (rows,). panel_bytes: float32 bytes
    that are widened at once, PANEL_BYTES if not told.
    """
    n_rows, n_columns = shape
    flat = x.reshape(-1, n_columns).to(torch.float32)
    sums = flat.new_empty(len(flat), n_rows)
    step = max(1, (panel_bytes or PANEL_BYTES) // (4 * n_columns))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        torch.mm(flat, widen(rows).t(), out=sums[:, rows])
    if scales is None:
        y = sums if bias is None else sums.add_(bias.to(torch.float32))
    else:
        y = sums.mul_(scales) if bias is None else torch.addcmul(bias.to(torch.float32), sums, scales)
    return y.to(x.dtype).reshape(*x.shape[:-1], n_rows)
