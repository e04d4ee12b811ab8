"""Formats of 4, 3 and 2 bits: groups of 32 weights, a table of values, a searched scale in float16.

One class and one packed layout (`ggtool.kernels.planes`), with a codebook per format. Codebooks are normalized to 1,
so that scales are as large as weights and avoid float16's subnormals. Scales take 0.5 bits per weight; in all four
4-bit codebooks, groups of 32 have a fifth less error than groups of 64.
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
from ggtool.quantizers.search import search_scales

GROUP = 32

# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E; the digits are bitsandbytes'.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' four-bit floats: 2 bits of exponent, 1 of mantissa, and a zero that comes twice; see its FP4 table.
FP4_MAGNITUDES = (0.0, 1 / 192, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0)
FP4_VALUES = (*(-value for value in reversed(FP4_MAGNITUDES)), *FP4_MAGNITUDES)
# kvalues_iq4nl of ggml, in units of 127.
IQ4_VALUES = tuple(
    value / 127 for value in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)


def linear(bits: int) -> tuple[float, ...]:
    """Return the even steps of a signed integer of so many bits, -1 included and 1 not."""
    half = 1 << (bits - 1)
    return tuple(code / half for code in range(-half, half))


class TableQuantizer(WidenedByPanels):
    """W ~ values[code] * scale, a signed float16 scale for each group in a row.

    codes: uint8 (rows, groups, bytes). scales: float16 (rows, groups, 1).
    values: the table, ascending; 16, 8 or 4 of them. 8 must be evenly spaced: they are packed as 2 bits and 1.
    group: weights that share a scale; the last group of a row is zero-padded.
    """

    def __init__(self, values: tuple[float, ...], group: int = GROUP) -> None:
        self.values = values
        self.group = group
        self._planes = _planes_of(values)
        self._form = in_planes(self._planes, group, scales_per_group=1)

    @property
    def form(self) -> Form | None:
        """Planes that share a scale."""
        return self._form

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return codes and scales for a finite `weight` (rows, columns); scales saturate at 65504."""
        all_codes, all_scales = [], []
        for weights in group_panels(weight, self.group):
            codes, scales = self._encode(weights)
            all_codes.append(self.pack(codes))
            all_scales.append(scales[..., None])
        return QuantizedTensor(
            torch.cat(all_codes), torch.cat(all_scales), (weight.shape[0], weight.shape[1])
        )

    def dequantize(self, quantized: QuantizedTensor) -> Tensor:
        """Return the float32 matrix (rows, columns) that the codes stand for."""
        weights = planes.widen(quantized.codes, quantized.scales, self._planes, self.group)
        return weights[:, : quantized.shape[1]]

    def round_trip(self, weight: Tensor) -> Tensor:
        """Return float32 `weight` (rows, columns) as its codes have it; nothing is packed."""
        values = _values_on(self.values, weight.device)
        panels = []
        for weights in group_panels(weight, self.group):
            codes, scales = self._encode(weights)
            panels.append((values[codes.to(torch.int32)] * scales.to(torch.float32)[..., None]).flatten(1))
        return torch.cat(panels)[:, : weight.shape[1]]

    def codes(self, quantized: QuantizedTensor) -> Tensor:
        """Return the unpacked codes, uint8 (rows, columns): indices into `values`."""
        total = torch.zeros((), dtype=torch.uint8, device=quantized.codes.device)
        start, weight = 0, 1
        for plane in self._planes:
            stop = start + plane.n_bytes(self.group)
            total = total + weight * planes.unpack(quantized.codes[..., start:stop], plane, self.group)
            start, weight = stop, weight * plane.base
        return total.flatten(1)[:, : quantized.shape[1]]

    def pack(self, codes: Tensor) -> Tensor:
        """Return the bytes (rows, groups, bytes) of uint8 codes (rows, groups, group)."""
        packed = []
        for plane in self._planes:
            packed.append(planes.pack(codes % plane.base, plane))
            codes = codes // plane.base
        return torch.cat(packed, -1)

    def _encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 codes (rows, groups, group) and scales (rows, groups) of float32 weights."""
        return search_scales(weights, _values_on(self.values, weights.device))


@functools.cache
def _values_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy to a GPU waits for all queued work.
    return torch.tensor(values, dtype=torch.float32, device=device)


def _planes_of(values: tuple[float, ...]) -> tuple[Plane, ...]:
    # Two 3-bit codes in a byte would waste a quarter of it; four 2-bit and eight 1-bit codes waste none.
    return (Plane(values[:4]), Plane((0.0, values[4] - values[0]))) if len(values) == 8 else (Plane(values),)


INT4 = partial(TableQuantizer, linear(4))
NF4 = partial(TableQuantizer, NF4_VALUES)
FP4 = partial(TableQuantizer, FP4_VALUES)
IQ4 = partial(TableQuantizer, IQ4_VALUES)
INT3 = partial(TableQuantizer, linear(3))
INT2 = partial(TableQuantizer, linear(2))
