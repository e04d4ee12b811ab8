"""NF4 and FP4 exactly as bitsandbytes makes them on a CPU: blocks of 64, float32 absmax, no search.

The baseline for the searched formats: codes and absmax equal, bit for bit, those of
`bitsandbytes.functional.quantize_4bit` (0.50) wherever the columns are a multiple of 64. Elsewhere its blocks
cross row ends; here each row begins a new block. Packing and product are our own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ggtool.quantizers.search import nearest
from ggtool.quantizers.tables import FP4_MAGNITUDES, NF4_VALUES, TableQuantizer

BLOCK = 64
# The library's smallest divisor, so that a block of zeros has defined codes.
_SMALLEST_DIVISOR = 1e-38
# Its order of FP4: code bits are sign, two of exponent, one of mantissa.
_FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)
_FP4_HALF = tuple(FP4_MAGNITUDES[index] for index in _FP4_ORDER)
FP4_CODES = (*_FP4_HALF, *(-value for value in _FP4_HALF))


class Blockwise(TableQuantizer):
    """W ~ values[code] * absmax per block of 64 in a row, values in the library's order of codes.

    codes: uint8 (rows, blocks, 32). scales: float32 (rows, blocks, 1), the absmax.
    """

    def __init__(self, values: tuple[float, ...]) -> None:
        super().__init__(values, BLOCK)

    def _encode(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.tensor(self.values, dtype=torch.float32, device=weights.device)
        order = values.argsort()
        absmax = weights.abs().amax(-1)
        # Multiply by the reciprocal as the library does: division rounds some weights to the other neighbour.
        scaled = (weights * (1.0 / absmax.clamp(min=_SMALLEST_DIVISOR))[..., None]).clamp(-1, 1)
        return order[nearest(scaled, values[order])].to(torch.uint8), absmax


NF4 = partial(Blockwise, NF4_VALUES)
FP4 = partial(Blockwise, FP4_CODES)
