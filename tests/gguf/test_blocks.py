"""Blocks taken apart, against ggml's own dequantization."""

from __future__ import annotations

import numpy as np
import pytest

from ggtool.conversion.ggml import dequantize_rows
from ggtool.gguf.blocks import block_dtype, fields, take_apart
from ggtool.gguf.tensor_types import TENSOR_TYPES

TAKEN_APART = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
SIZES = {name: (block, n_bytes) for name, block, n_bytes in TENSOR_TYPES.values()}


@pytest.mark.parametrize("type_name", SIZES)
def test_fields_fill_the_block(type_name: str) -> None:
    assert block_dtype(type_name).itemsize == SIZES[type_name][1]
    assert sum(field.n_bytes for field in fields(type_name)) == SIZES[type_name][1]


@pytest.mark.parametrize("type_name", TAKEN_APART)
def test_scales_and_levels_give_ggmls_weights_exactly(type_name: str) -> None:
    block, n_bytes = SIZES[type_name]
    rng = np.random.default_rng(len(type_name) + block)
    for _ in range(10):
        record = np.frombuffer(rng.bytes(n_bytes), block_dtype(type_name)).copy()
        for name in ("d", "dmin", "m"):
            if name in (record.dtype.names or ()):
                record[name] = rng.normal() * 0.1
        if type_name == "MXFP4":
            record["e"] = rng.integers(100, 140)
        taken = take_apart(type_name, record.tobytes())
        assert taken.levels is not None
        weights = np.empty(block, np.float32)
        for group in taken.groups:
            part = slice(group.start, group.start + group.n_weights)
            levels = taken.levels[part].astype(np.float32)
            weights[part] = np.float32(group.scale) * levels - np.float32(group.minimum)
        theirs = dequantize_rows(type_name, np.frombuffer(record.tobytes(), np.uint8).copy(), block)[0]
        assert np.array_equal(weights, theirs)
        assert sum(group.n_weights for group in taken.groups) == block


def test_a_pattern_type_has_fields_and_no_codes() -> None:
    taken = take_apart("IQ2_XXS", np.float16(0.5).tobytes() + bytes(64))
    assert (taken.groups, taken.codes, taken.levels) == ((), None, None)
    assert taken.fields["d"] == (0.5,)
