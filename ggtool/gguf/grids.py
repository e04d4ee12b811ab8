"""The grid that a tensor type rounds to, and the numbers of whole tensors taken out of their blocks and put back.

A weight is `scale * level[code] - minimum`, one scale and minimum per group of weights. In a block of several groups both
are small integers times a float16 of the block, `d * scale code` and `dmin * minimum code`; elsewhere the group is the
block and `d` the scale. Layouts are those of ggml-common.h at the pinned commit (see `ggtool.gguf.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.gguf.blocks import IQ4_LEVELS, block_dtype
from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

# Codes and what they are packed into: uint8 wherever it matters, which the operators do not tell a type checker.
Bytes = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """What a tensor type can hold.

    Attributes:
        type_name: ggml's name, such as "Q4_K".
        block: weights in a block.
        group: weights that share a scale.
        levels: the value of each code before scale and minimum, ascending.
        scales: the least and the largest scale code; both 1 where the group is the block.
        max_minimum: the largest minimum code, 0 for a type without minimums.

    """

    type_name: str
    block: int
    group: int
    levels: tuple[int, ...]
    scales: tuple[int, int] = (1, 1)
    max_minimum: int = 0

    @property
    def is_nested(self) -> bool:
        """Whether a block holds several groups with integer scales."""
        return self.group < self.block


@dataclass(frozen=True)
class Parts:
    """The numbers of a tensor's rows.

    Attributes:
        codes: uint8 (n_rows, n_per_row), indices into the grid's levels.
        scales, minimums: int16 (n_rows, n_per_row / group).
        d, dmin: float32 (n_rows, n_per_row / block), each one that float16 can hold.

    """

    codes: Bytes
    scales: npt.NDArray[np.int16]
    minimums: npt.NDArray[np.int16]
    d: Floats
    dmin: Floats

    def copy(self) -> Parts:
        """Return a copy that shares no memory."""
        return Parts(
            self.codes.copy(), self.scales.copy(), self.minimums.copy(), self.d.copy(), self.dmin.copy()
        )


def _grid(name: str, group: int, levels: tuple[int, ...], *limits: int) -> Grid:
    _, block, _ = TENSOR_TYPES[TYPE_NUMBERS[name]]
    low, high, minimum = limits or (1, 1, 0)
    return Grid(name, block, group, levels, (low, high), minimum)


GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        row.type_name: row
        for row in (
            _grid("Q4_0", 32, tuple(range(-8, 8))),
            _grid("Q5_0", 32, tuple(range(-16, 16))),
            _grid("Q8_0", 32, tuple(range(-127, 128))),
            _grid("IQ4_NL", 32, IQ4_LEVELS),
            _grid("Q2_K", 16, tuple(range(4)), 0, 15, 15),
            _grid("Q3_K", 16, tuple(range(-4, 4)), -32, 31, 0),
            _grid("Q4_K", 32, tuple(range(16)), 0, 63, 63),
            _grid("Q5_K", 32, tuple(range(32)), 0, 63, 63),
            _grid("Q6_K", 16, tuple(range(-32, 32)), -128, 127, 0),
            _grid("IQ4_XS", 32, IQ4_LEVELS, -32, 31, 0),
        )
    }
)


def split_rows(type_name: str, data: Bytes, n_per_row: int) -> Parts:
    """Take the numbers of a tensor out of its bytes; `data` is whole rows, one after another."""
    grid = GRIDS[type_name]
    records = data.reshape(-1).view(block_dtype(type_name)).reshape(-1, n_per_row // grid.block)
    n_rows, n_blocks = records.shape
    codes, scales, minimums = _TAKERS[type_name](records)
    n_groups = n_blocks * (grid.block // grid.group)
    whole = (n_rows, n_groups)
    d = records["d"].reshape(n_rows, n_blocks).astype(np.float32)
    return Parts(
        np.ascontiguousarray(codes.reshape(n_rows, n_per_row)),
        np.ones(whole, np.int16) if scales is None else scales.reshape(whole).astype(np.int16),
        np.zeros(whole, np.int16) if minimums is None else minimums.reshape(whole).astype(np.int16),
        d,
        records["dmin"].reshape(n_rows, n_blocks).astype(np.float32)
        if grid.max_minimum
        else np.zeros_like(d),
    )


def join_rows(type_name: str, parts: Parts) -> Bytes:
    """Put the numbers back into blocks; return the bytes, row after row. The inverse of `split_rows`."""
    grid = GRIDS[type_name]
    n_rows, n_per_row = parts.codes.shape
    n_blocks = n_per_row // grid.block
    records = np.zeros((n_rows, n_blocks), block_dtype(type_name))
    records["d"][..., 0] = parts.d.astype(np.float16)
    if grid.max_minimum:
        records["dmin"][..., 0] = parts.dmin.astype(np.float16)
    groups = (n_rows, n_blocks, grid.block // grid.group)
    low = grid.scales[0] if grid.is_nested and type_name != "Q6_K" else 0
    scales = (parts.scales.reshape(groups) - low).astype(np.uint8)
    minimums = parts.minimums.reshape(groups).astype(np.uint8)
    _MAKERS[type_name](records, parts.codes.reshape(n_rows, n_blocks, grid.block), scales, minimums)
    return records.reshape(-1).view(np.uint8)


def values(grid: Grid, parts: Parts) -> Floats:
    """Return the weights (n_rows, n_per_row) as llama.cpp dequantizes them."""
    per_block = grid.block // grid.group
    scale = np.repeat(parts.d, per_block, axis=1) * parts.scales.astype(np.float32)
    minimum = np.repeat(parts.dmin, per_block, axis=1) * parts.minimums.astype(np.float32)
    levels = np.array(grid.levels, np.float32)[parts.codes]
    found: Floats = levels * np.repeat(scale, grid.group, axis=1)
    found -= np.repeat(minimum, grid.group, axis=1)
    return found


_Records = npt.NDArray[np.void]
_Taken = tuple[Bytes, Bytes | None, Bytes | None]


def _halves(packed: Bytes) -> Bytes:
    """4-bit codes along the last axis: all the low halves, then all the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _from_halves(codes: Bytes) -> Bytes:
    half = codes.shape[-1] // 2
    found: Bytes = codes[..., :half] | codes[..., half:] << 4
    return found


def _by_32(packed: Bytes, bits: int) -> Bytes:
    """Codes of `bits` bits along the last axis: of every 32 bytes the lowest bits of each, then the next higher."""
    steps = (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    rows = packed.reshape(*packed.shape[:-1], -1, 1, 32) >> steps & ((1 << bits) - 1)
    return rows.reshape(*packed.shape[:-1], -1)


def _from_by_32(codes: Bytes, bits: int) -> Bytes:
    steps = (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    rows = codes.reshape(*codes.shape[:-1], -1, 8 // bits, 32) << steps
    found: Bytes = np.bitwise_or.reduce(rows, axis=-2).reshape(*codes.shape[:-1], -1)
    return found


def _take_nibbles(records: _Records) -> _Taken:
    return _halves(records["qs"]), None, None


def _make_nibbles(records: _Records, codes: Bytes, _scales: Bytes, _minimums: Bytes) -> None:
    records["qs"] = _from_halves(codes)


def _take_q5_0(records: _Records) -> _Taken:
    fifth = np.unpackbits(np.ascontiguousarray(records["qh"]), axis=-1, bitorder="little")
    return _halves(records["qs"]) | fifth << 4, None, None


def _make_q5_0(records: _Records, codes: Bytes, _scales: Bytes, _minimums: Bytes) -> None:
    records["qs"] = _from_halves(codes & 15)
    records["qh"] = np.packbits(codes >> 4, axis=-1, bitorder="little")


def _take_q8_0(records: _Records) -> _Taken:
    # -128 does not occur: llama.cpp's own codes are symmetric.
    return (np.maximum(records["qs"], -127).astype(np.int16) + 127).astype(np.uint8), None, None


def _make_q8_0(records: _Records, codes: Bytes, _scales: Bytes, _minimums: Bytes) -> None:
    records["qs"] = codes.astype(np.int16) - 127


def _take_q2_k(records: _Records) -> _Taken:
    return _by_32(records["qs"], 2), records["scales"] & 15, records["scales"] >> 4


def _make_q2_k(records: _Records, codes: Bytes, scales: Bytes, minimums: Bytes) -> None:
    records["qs"] = _from_by_32(codes, 2)
    records["scales"] = scales | minimums << 4


_QUARTERS = np.arange(16) % 4, (2 * (np.arange(16) // 4)).astype(np.uint8)


def _take_q3_k(records: _Records) -> _Taken:
    packed = records["scales"]
    column, shift = _QUARTERS
    scales = _halves(packed[..., :8]) | (packed[..., 8:][..., column] >> shift & 3) << 4
    codes = _by_32(records["qs"], 2) | _by_32(records["hmask"], 1) << 2
    return codes, scales.astype(np.int16) - 32, None


def _make_q3_k(records: _Records, codes: Bytes, scales: Bytes, _minimums: Bytes) -> None:
    records["qs"] = _from_by_32(codes & 3, 2)
    records["hmask"] = _from_by_32(codes >> 2, 1)
    high = (scales >> 4).reshape(*scales.shape[:-1], 4, 4) << _QUARTERS[1].reshape(4, 4)
    records["scales"] = np.concatenate(
        [_from_halves(scales & 15), np.bitwise_or.reduce(high, axis=-2)], axis=-1
    )


def _take_six_bits(records: _Records) -> tuple[Bytes, Bytes]:
    packed = records["scales"]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)


def _make_six_bits(records: _Records, scales: Bytes, minimums: Bytes) -> None:
    low, high = (part[..., 4:] & 15 for part in (scales, minimums))
    records["scales"] = np.concatenate(
        [*(part[..., :4] | part[..., 4:] >> 4 << 6 for part in (scales, minimums)), low | high << 4], axis=-1
    )


def _take_q4_k(records: _Records) -> _Taken:
    return _by_32(records["qs"], 4), *_take_six_bits(records)


def _make_q4_k(records: _Records, codes: Bytes, scales: Bytes, minimums: Bytes) -> None:
    records["qs"] = _from_by_32(codes, 4)
    _make_six_bits(records, scales, minimums)


def _take_q5_k(records: _Records) -> _Taken:
    return _by_32(records["qs"], 4) | _by_32(records["qh"], 1) << 4, *_take_six_bits(records)


def _make_q5_k(records: _Records, codes: Bytes, scales: Bytes, minimums: Bytes) -> None:
    records["qs"] = _from_by_32(codes & 15, 4)
    records["qh"] = _from_by_32(codes >> 4, 1)
    _make_six_bits(records, scales, minimums)


def _take_q6_k(records: _Records) -> _Taken:
    low = _halves(records["ql"].reshape(*records.shape, 2, 64)).reshape(*records.shape, 256)
    return low | _by_32(records["qh"], 2) << 4, records["scales"], None


def _make_q6_k(records: _Records, codes: Bytes, scales: Bytes, _minimums: Bytes) -> None:
    records["ql"] = _from_halves((codes & 15).reshape(*records.shape, 2, 128)).reshape(*records.shape, 128)
    records["qh"] = _from_by_32(codes >> 4, 2)
    records["scales"] = scales.view(np.int8)


_EIGHTHS = (2 * np.arange(8)).astype(np.uint16)


def _take_iq4_xs(records: _Records) -> _Taken:
    low = np.stack([records["scales_l"] & 15, records["scales_l"] >> 4], axis=-1).reshape(*records.shape, 8)
    high = records["scales_h"] >> _EIGHTHS & 3
    codes = _halves(records["qs"].reshape(*records.shape, 8, 16))
    return codes.reshape(*records.shape, 256), (low | high << 4).astype(np.int16) - 32, None


def _make_iq4_xs(records: _Records, codes: Bytes, scales: Bytes, _minimums: Bytes) -> None:
    records["qs"] = _from_halves(codes.reshape(*records.shape, 8, 32)).reshape(*records.shape, 128)
    records["scales_l"] = scales[..., ::2] & 15 | (scales[..., 1::2] & 15) << 4
    high = (scales >> 4).astype(np.uint16) << _EIGHTHS
    records["scales_h"] = np.bitwise_or.reduce(high, axis=-1)[..., None]


_TAKERS: Mapping[str, Callable[[_Records], _Taken]] = MappingProxyType(
    {
        "Q4_0": _take_nibbles,
        "Q5_0": _take_q5_0,
        "Q8_0": _take_q8_0,
        "IQ4_NL": _take_nibbles,
        "Q2_K": _take_q2_k,
        "Q3_K": _take_q3_k,
        "Q4_K": _take_q4_k,
        "Q5_K": _take_q5_k,
        "Q6_K": _take_q6_k,
        "IQ4_XS": _take_iq4_xs,
    }
)
_MAKERS: Mapping[str, Callable[[_Records, Bytes, Bytes, Bytes], None]] = MappingProxyType(
    {
        "Q4_0": _make_nibbles,
        "Q5_0": _make_q5_0,
        "Q8_0": _make_q8_0,
        "IQ4_NL": _make_nibbles,
        "Q2_K": _make_q2_k,
        "Q3_K": _make_q3_k,
        "Q4_K": _make_q4_k,
        "Q5_K": _make_q5_k,
        "Q6_K": _make_q6_k,
        "IQ4_XS": _make_iq4_xs,
    }
)
