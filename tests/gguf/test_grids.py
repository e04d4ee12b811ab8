"""Taking tensors apart and putting them together, against llama.cpp's own bytes and values."""

from __future__ import annotations

import numpy as np
import pytest

from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.gguf.grids import GRIDS, Parts, join_rows, split_rows, values
from ggtool.gguf.tensor_types import row_bytes


@pytest.mark.parametrize("type_name", GRIDS)
def test_the_parts_of_llama_cpps_bytes_are_its_values_and_become_its_bytes_again(type_name: str) -> None:
    rows = np.random.default_rng(1).standard_normal((5, 768)).astype(np.float32)
    data = quantize_rows(type_name, rows)
    parts = split_rows(type_name, data, 768)
    assert np.array_equal(values(GRIDS[type_name], parts), dequantize_rows(type_name, data, 768))
    assert np.array_equal(join_rows(type_name, parts), data)


@pytest.mark.parametrize("type_name", GRIDS)
def test_any_parts_become_bytes_that_llama_cpp_reads_as_the_same_values(type_name: str) -> None:
    grid, random = GRIDS[type_name], np.random.default_rng(2)
    groups, blocks = (3, 512 // grid.group), (3, 512 // grid.block)
    parts = Parts(
        random.integers(0, len(grid.levels), (3, 512)).astype(np.uint8),
        random.integers(grid.scales[0], grid.scales[1] + 1, groups).astype(np.int16),
        random.integers(0, grid.max_minimum + 1, groups).astype(np.int16),
        random.standard_normal(blocks).astype(np.float16).astype(np.float32),
        random.random(blocks).astype(np.float16).astype(np.float32) * bool(grid.max_minimum),
    )
    data = join_rows(type_name, parts)
    assert data.nbytes == 3 * row_bytes(type_name, 512)
    assert np.array_equal(dequantize_rows(type_name, data, 512), values(grid, parts))
