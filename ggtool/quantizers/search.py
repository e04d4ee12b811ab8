"""Search the best float16 scale for a group of weights and a codebook.

The group's largest weight is mapped to several positions near both ends of the codebook (the scale may be negative).
Each try rounds the weights, refits the scale to the codes by least squares and rounds it to float16; the smallest
squared error wins. Errors may be weighted by the importance of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.kernels.nearest import bucketize

# Positions of the largest weight, relative to the codebook's end. More of them gain less than 1 % of the error.
_PLACES = (0.80, 0.86, 0.92, 0.98, 1.04, 1.10)
_MAX_SCALE = torch.finfo(torch.float16).max


def nearest(weights: Tensor, values: Tensor) -> Tensor:
    """Return int32 indices into ascending `values`, the nearest to each weight; half way, the lower one."""
    return bucketize(weights, (values[1:] + values[:-1]) / 2)


def search_scales(weights: Tensor, values: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return uint8 codes (..., group) and signed float16 scales (...) for finite weights (..., group).

    values: ascending float32, the table's ends at about -1 and 1. Groups of zeros have scale 0; scales
    saturate at 65504. importance: of each weight's squared error, not negative, of a shape that broadcasts to
    the weights'; a group of none but zeros counts all its weights alike.
    """
    largest = torch.linalg.vector_norm(weights, torch.inf, dim=-1, keepdim=True)
    # Within -1 and 1 no square overflows, and none that matters underflows.
    unit = torch.where(largest > 0, largest, 1.0)
    units = weights / unit
    share = torch.ones(()) if importance is None else _shares(importance)
    best_error = torch.full_like(largest, torch.inf)
    best_scale = torch.zeros_like(largest, dtype=torch.float16)
    peak = units.gather(-1, units.abs().argmax(-1, keepdim=True))
    for end in (values[0], values[-1]):
        for place in _PLACES:
            scale = peak / (end * place)
            digits = values[nearest(units / torch.where(scale == 0, 1.0, scale), values)]
            weighted = share * digits
            fitted = (units * weighted).sum(-1, keepdim=True) / (digits * weighted).sum(-1, keepdim=True)
            scale = (fitted.nan_to_num(0.0) * unit).clamp(-_MAX_SCALE, _MAX_SCALE).to(torch.float16)
            rest = units - digits * (scale.to(torch.float32) / unit)
            error = (share * rest.square()).sum(-1, keepdim=True)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            best_scale = torch.where(is_better, scale, best_scale)
    return round_to(weights, best_scale[..., 0], values), best_scale[..., 0]


def _shares(importance: Tensor) -> Tensor:
    largest = importance.amax(-1, keepdim=True)
    return torch.where(largest > 0, importance / torch.where(largest > 0, largest, 1.0), 1.0)


def round_to(weights: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Return uint8 codes (..., group): weights / scale rounded to the table. Where a scale is 0, any code is 0."""
    divisors = torch.where(scales == 0, 1.0, scales.to(torch.float32))[..., None]
    return nearest(weights / divisors, values).to(torch.uint8)
