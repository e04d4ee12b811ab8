"""ggml's tensor types: number, name, weights a block, bytes a block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gguf.constants import GGML_QUANT_SIZES

# number -> (name, weights per block, bytes per block). Q2_0 is in ggml and not yet in gguf 0.19.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {42: ("Q2_0", 64, 18), **{int(t): (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}}
)


TYPE_NUMBERS: Mapping[str, int] = MappingProxyType(
    {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
)


def row_bytes(type_name: str, n_per_row: int) -> int:
    """Return the size of one row of `n_per_row` weights in a tensor type such as "Q4_K"."""
    _, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    assert n_per_row % block == 0, f"{n_per_row} weights are no whole {type_name} blocks"
    return n_per_row // block * block_bytes
