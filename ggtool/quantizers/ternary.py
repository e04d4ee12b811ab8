"""Ternary weights: codes -1, 0, 1 times a scale, in one to three planes that each fit the residual of the others.

As in BitNet b1.58 (arXiv 2402.17764) a scale is a mean of absolute weights, but of those alone that become -1 or 1: the
largest k of a group of 64, k chosen for the least squared error. Several planes are then refined in turn, each
fitted to the residual of the others. Five codes share a byte; a plane costs 1.625 bits per weight
and 0.25 for its scales.
"""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from ggtool.kernels import planes
from ggtool.kernels.form import Form, in_planes
from ggtool.kernels.planes import Plane
from ggtool.quantizers import QuantizedTensor
from ggtool.quantizers.base import WidenedByPanels
from ggtool.quantizers.groups import group_panels

GROUP = 64
PLANE = Plane((-1.0, 0.0, 1.0))
_TURNS = 6
_MAX_SCALE = torch.finfo(torch.float16).max


class Ternary(WidenedByPanels):
    """W ~ sum over planes of code * scale, codes in -1, 0, 1 and scales per group of 64.

    codes: uint8 (rows, groups, 13 * n_planes). scales: float16 (rows, groups, n_planes).
    """

    def __init__(self, n_planes: int) -> None:
        self.n_planes = n_planes
        self._form = in_planes((PLANE,) * n_planes, GROUP, scales_per_group=n_planes)

    @property
    def form(self) -> Form | None:
        """Planes with a scale each."""
        return self._form

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for a finite `weight` (rows, columns); scales saturate at 65504."""
        all_codes, all_scales = [], []
        for weights in group_panels(weight, GROUP):
            found = fit_planes(weights, self.n_planes)
            all_codes.append(torch.cat([planes.pack(trits + 1, PLANE) for trits, _ in found], -1))
            all_scales.append(torch.stack([scale for _, scale in found], -1))
        return QuantizedTensor(
            torch.cat(all_codes), torch.cat(all_scales), (weight.shape[0], weight.shape[1])
        )

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""
        weights = planes.widen(quantized.codes, quantized.scales, (PLANE,) * self.n_planes, GROUP)
        return weights[:, : quantized.shape[1]]

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return float32 `weight` (rows, columns) as its codes have it; nothing is packed."""
        panels = []
        for weights in group_panels(weight, GROUP):
            terms = [
                trits * scale.to(torch.float32)[..., None]
                for trits, scale in fit_planes(weights, self.n_planes)
            ]
            panels.append(functools.reduce(torch.add, terms).flatten(1))
        return torch.cat(panels)[:, : weight.shape[1]]


def fit_planes(weights: Tensor, n_planes: int) -> list[tuple[Tensor, Tensor]]:
    """Return for each plane float32 codes -1, 0, 1 (..., group) and float16 scales (...) of `weights` (..., group)."""
    largest = torch.linalg.vector_norm(weights, torch.inf, dim=-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    rest = weights / unit  # within -1 and 1 no sum overflows
    found = []
    for _ in range(n_planes):
        trits, scale = ternarize(rest)
        rest = rest - trits * scale
        found.append((trits, scale))
    if n_planes > 1:
        for turn in range(_TURNS * n_planes):
            trits, scale = found[turn % n_planes]
            others = rest + trits * scale
            trits = _round(others, scale)
            scale = (others * trits).sum(-1, keepdim=True) / trits.square().sum(-1, keepdim=True).clamp(min=1)
            rest = others - trits * scale
            found[turn % n_planes] = (trits, scale)
    return [(trits, (scale * unit)[..., 0].clamp(max=_MAX_SCALE).to(torch.float16)) for trits, scale in found]


def ternarize(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 codes (..., group) and scales (..., 1) with the least squared error for `weights`."""
    sums = weights.abs().sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, weights.shape[-1] + 1, device=weights.device)
    # With the k largest at their mean m, the squared error falls by k * m ** 2.
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    scale = sums.gather(-1, best) / (best + 1)
    return _round(weights, scale), scale


def _round(weights: Tensor, scale: Tensor) -> Tensor:
    # Compared, not divided: a scale of 0 gives -1 and 1, which stand for 0.
    return (weights > scale / 2).to(torch.float32) - (weights < -scale / 2).to(torch.float32)


ONE_PLANE = partial(Ternary, 1)
TWO_PLANES = partial(Ternary, 2)
THREE_PLANES = partial(Ternary, 3)
