"""IQ3_S, whose codes stand for four weights at a time: the numbers of whole tensors taken out of their blocks and put back.

Four weights are `d * (1 + 2 * scale) * vector`, the vector one of 512 of odd numbers up to 15, each number with a sign of its own: one of a book of 8,192. A scale
of 0 to 15 serves 32 weights, a float16 `d` 256. The layout is that of ggml-common.h at the pinned commit (see `ggtool.gguf.blocks`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.quants import IQ3_S

from ggtool.gguf.blocks import block_dtype

Bytes = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

TYPE_NAME = "IQ3_S"
# Weights that a code, a scale and d serve.
SIZE, GROUP, BLOCK = 4, 32, 256
_N_ENTRIES = 512


@dataclass(frozen=True)
class Vectors:
    """The numbers of a tensor's rows.

    Attributes:
        codes: int32 (n_rows, n_per_row / SIZE), places in `book`.
        scales: uint8 (n_rows, n_per_row / GROUP), 0 to 15.
        d: float32 (n_rows, n_per_row / BLOCK), each one that float16 can hold.

    """

    codes: npt.NDArray[np.int32]
    scales: npt.NDArray[np.uint8]
    d: Floats

    @property
    def sizes(self) -> Floats:
        """What the book's vectors are multiplied with, (n_rows, n_per_row / GROUP)."""
        factors = 1 + 2 * self.scales.astype(np.float32)
        found: Floats = np.repeat(self.d, BLOCK // GROUP, axis=1) * factors
        return found

    @property
    def values(self) -> Floats:
        """The weights (n_rows, n_per_row) as llama.cpp dequantizes them."""
        vectors = book()[self.codes].reshape(len(self.codes), -1)
        found: Floats = vectors * np.repeat(self.sizes, GROUP, axis=1)
        return found


@functools.cache
def book() -> Floats:
    """Return all vectors, float32 (8192, SIZE): code = 512 * signs + entry, bit b of `signs` set where number b is negative."""
    IQ3_S.init_grid()
    assert IQ3_S.grid is not None
    entries = np.asarray(IQ3_S.grid, np.float32).reshape(_N_ENTRIES, SIZE)
    signs = 1 - 2 * (np.arange(1 << SIZE)[:, None] >> np.arange(SIZE) & 1)
    found: Floats = (signs[:, None, :].astype(np.float32) * entries).reshape(-1, SIZE)
    return found


def split_vectors(data: Bytes, n_per_row: int) -> Vectors:
    """Take the numbers of a tensor out of its bytes; `data` is whole rows, one after another."""
    records = data.reshape(-1).view(block_dtype(TYPE_NAME)).reshape(-1, n_per_row // BLOCK)
    n_rows = len(records)
    entries = records["qs"].astype(np.int32) | _bits(records["qh"], 1).astype(np.int32) << 8
    codes = entries + _N_ENTRIES * _bits(records["signs"], 4).astype(np.int32)
    return Vectors(
        np.ascontiguousarray(codes.reshape(n_rows, -1)),
        np.ascontiguousarray(_bits(records["scales"], 4).reshape(n_rows, -1)),
        records["d"].reshape(n_rows, -1).astype(np.float32),
    )


def join_vectors(vectors: Vectors) -> Bytes:
    """Put the numbers back into blocks; return the bytes, row after row. The inverse of `split_vectors`."""
    n_rows, n_blocks = vectors.d.shape
    records = np.zeros((n_rows, n_blocks), block_dtype(TYPE_NAME))
    codes = vectors.codes.reshape(n_rows, n_blocks, -1)
    entries, signs = codes % _N_ENTRIES, (codes // _N_ENTRIES).astype(np.uint8)
    records["d"][..., 0] = vectors.d.astype(np.float16)
    records["qs"] = entries & 255
    records["qh"] = _from_bits((entries >> 8).astype(np.uint8), 1)
    records["signs"] = _from_bits(signs, 4)
    records["scales"] = _from_bits(vectors.scales.reshape(n_rows, n_blocks, -1), 4)
    return records.reshape(-1).view(np.uint8)


def _bits(packed: Bytes, n: int) -> Bytes:
    """Numbers of `n` bits along the last axis, of each byte the lowest first."""
    steps = (n * np.arange(8 // n)).astype(np.uint8)
    found: Bytes = (packed[..., None] >> steps & ((1 << n) - 1)).reshape(*packed.shape[:-1], -1)
    return found


def _from_bits(numbers: Bytes, n: int) -> Bytes:
    steps = (n * np.arange(8 // n)).astype(np.uint8)
    rows = numbers.reshape(*numbers.shape[:-1], -1, 8 // n) << steps
    found: Bytes = np.bitwise_or.reduce(rows, axis=-1)
    return found
