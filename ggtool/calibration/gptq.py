"""GPTQ (arXiv 2210.17323): round a matrix column by column, feeding each error forward into the columns that follow.

The error minimized is that of the layer's outputs, tr((W - Ŵ) H (W - Ŵ)ᵀ) with H the mean of x xᵀ over calibration
inputs x. Columns go in order of falling H[i, i] ("act order"); scales are found beforehand, so that a group keeps
its columns together in storage ("static groups").
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.quantizers.search import nearest

# Lazy-update block size, in columns.
_BLOCK = 128
DAMPING = 0.01


def gptq_codes(
    weight: Tensor, hessian: Tensor, scales: Tensor, values: Tensor, *, damping: float = DAMPING
) -> Tensor:
    """Return uint8 codes (rows, columns) of a float32 `weight` of that shape.

    hessian: float (columns, columns), symmetric, no eigenvalue below 0. scales: float (rows, columns), the one
    of each weight's group. values: ascending float32, the table. damping: what is added to the diagonal, as a
    share of its mean. Rows whose output error plain rounding makes smaller are rounded plainly.
    """
    n_columns = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order].double(), damping).to(torch.float32)
    steps = scales.to(torch.float32)
    plain = _nearest(weight, steps, values)
    steps, rest = steps[:, order], weight[:, order]  # copies
    codes = torch.empty_like(plain)
    for start in range(0, n_columns, _BLOCK):
        stop = min(start + _BLOCK, n_columns)
        errors = torch.empty_like(rest[:, start:stop])
        for at in range(start, stop):
            codes[:, at] = _nearest(rest[:, at], steps[:, at], values)
            error = (rest[:, at] - values[codes[:, at].int()] * steps[:, at]) / factor[at, at]
            rest[:, at + 1 : stop] -= error[:, None] * factor[at, at + 1 : stop]
            errors[:, at - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = codes[:, order.argsort()]
    found, other = (
        output_error(weight - values[some.int()] * scales.to(torch.float32), hessian)
        for some in (codes, plain)
    )
    return torch.where((found <= other)[:, None], codes, plain)


def _nearest(weights: Tensor, steps: Tensor, values: Tensor) -> Tensor:
    return nearest(weights / torch.where(steps == 0, 1.0, steps), values).to(torch.uint8)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return each row's mean squared output error, (rows,), for a difference of weights (rows, columns)."""
    return ((difference @ hessian.to(difference.dtype)) * difference).sum(1)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper U with U.T @ U = inverse of the damped `hessian`; row i spreads the error of column i."""
    share = damping * (float(hessian.diagonal().mean()) or 1.0)
    failed = True
    while failed:  # float32 sums can leave an eigenvalue slightly below 0
        lower, info = torch.linalg.cholesky_ex(hessian + share * torch.eye(len(hessian)).to(hessian))
        failed, share = bool(info), 10 * share
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
