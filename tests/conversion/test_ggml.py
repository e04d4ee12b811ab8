"""libggml through ctypes: the same bytes whatever the pieces, and the values gguf-py reads back."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from ggtool.conversion.ggml import library_path, quantize_rows, valid
from ggtool.gguf.tensor_types import TENSOR_TYPES, row_bytes

ROWS = np.random.default_rng(3).standard_normal((12, 512)).astype(np.float32)
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_independent_and_come_back(name: str) -> None:
    whole = quantize_rows(name, ROWS)
    assert whole.nbytes == 12 * row_bytes(name, 512)
    parts = [quantize_rows(name, ROWS[begin : begin + 5].copy()) for begin in range(0, 12, 5)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    back = (
        quants.dequantize(whole.reshape(12, -1), GGMLQuantizationType[name])
        .view(np.float32)
        .reshape(ROWS.shape)
    )
    bits = 8 * row_bytes(name, 512) / 512
    assert np.sqrt(np.mean((back - ROWS) ** 2)) < 3.0 * 2.0 ** -min(bits, 9)  # the error halves with each bit


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0"])
def test_the_simple_types_are_those_of_gguf_py_byte_for_byte(name: str) -> None:
    assert quantize_rows(name, ROWS).tobytes() == quants.quantize(ROWS, GGMLQuantizationType[name]).tobytes()


def test_halves_are_those_of_libggml_base_even_where_they_are_subnormal_or_ties() -> None:
    import ctypes

    random = np.random.default_rng(4)
    some = random.integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    halves = random.integers(0, 0x7BFF, 1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = halves + np.spacing(halves.astype(np.float16)).astype(np.float32) / 2
    values = np.concatenate([some[np.abs(some) <= 65504], 1e-6 * ROWS.ravel(), halves, ties[ties < 65504]])
    rows = np.concatenate([values, -values])[None]
    theirs = np.empty(rows.size, np.uint16)
    ggml = ctypes.CDLL(str(library_path("ggml-base")))
    ggml.ggml_fp32_to_fp16_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    ggml.ggml_fp32_to_fp16_row(rows.ctypes.data, theirs.ctypes.data, rows.size)
    assert quantize_rows("F16", rows).tobytes() == theirs.tobytes()


def test_the_table_of_types_is_ggmls_own() -> None:
    import ctypes

    ggml = ctypes.CDLL(str(library_path("ggml-base")))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    for number, (name, block, block_bytes) in TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode().upper() == name.upper()
        if name != "Q8_1":  # never on disk; gguf-py counts its sums as float32
            assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (block, block_bytes), name


def test_values_out_of_range_are_not_valid() -> None:
    assert valid("F16", quantize_rows("F16", ROWS))
    assert not valid("F16", quantize_rows("F16", ROWS * 1e6))
    assert not valid("Q4_0", quantize_rows("Q4_0", ROWS * 1e7))
