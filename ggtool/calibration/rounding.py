"""Importance-weighted rounding to a codebook, and packing of codes chosen elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ggtool.quantizers import QuantizedTensor
from ggtool.quantizers.groups import group_panels, pad_columns
from ggtool.quantizers.search import search_scales
from ggtool.quantizers.tables import TableQuantizer


def round_weighted(
    quantizer: TableQuantizer, weight: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return uint8 codes (rows, columns) and float16 scales (rows, groups) of a finite `weight` (rows, columns).

    importance: weight of each column's squared error, (columns,), not negative.
    """
    values = table(quantizer, weight.device)
    shares = None
    if importance is not None:
        shares = pad_columns(importance[None], quantizer.group).view(1, -1, quantizer.group)
    found = [search_scales(panel, values, shares) for panel in group_panels(weight, quantizer.group)]
    codes = torch.cat([codes.flatten(1) for codes, _ in found])
    return codes[:, : weight.shape[1]], torch.cat([scales for _, scales in found])


def restore(quantizer: TableQuantizer, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weights (rows, columns) that codes and scales stand for."""
    return table(quantizer, codes.device)[codes.int()] * spread(quantizer, scales, codes.shape[1])


def spread(quantizer: TableQuantizer, scales: Tensor, n_columns: int) -> Tensor:
    """Return each weight's scale, float32 (rows, columns), for scales (rows, groups)."""
    return scales.to(torch.float32).repeat_interleave(quantizer.group, 1)[:, :n_columns]


def table(quantizer: TableQuantizer, device: torch.device) -> Tensor:
    """Return the quantizer's values, float32."""
    return torch.tensor(quantizer.values, dtype=torch.float32, device=device)


def pack(quantizer: TableQuantizer, codes: Tensor, scales: Tensor) -> QuantizedTensor:
    """Return the packed matrix of uint8 codes (rows, columns) and float16 scales (rows, groups)."""
    n_rows, n_columns = codes.shape
    # The last group is padded with code 0, which no product reads.
    whole = F.pad(codes, (0, -n_columns % quantizer.group)).view(n_rows, -1, quantizer.group)
    return QuantizedTensor(quantizer.pack(whole), scales[..., None].contiguous(), (n_rows, n_columns))
