"""Rows of a mapped tensor under every kind of view, read in pieces that must add up to the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from ggtool.conversion.tensors import ModelTensor
from ggtool.source.safetensors import LazyTensor, open_checkpoint

STORED = np.random.default_rng(1).standard_normal((24, 32)).astype(np.float16)


@pytest.fixture
def source(tmp_path: Path) -> LazyTensor:
    save_file({"w": STORED}, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)["w"]


def in_pieces(tensor: ModelTensor, step: int) -> npt.NDArray[np.float32]:
    starts = range(0, tensor.n_rows, step)
    return np.concatenate([tensor.rows(begin, min(begin + step, tensor.n_rows)) for begin in starts])


@pytest.mark.parametrize("step", [1, 5, 100])
@pytest.mark.parametrize("band_bytes", [1, 200, 1 << 21])
def test_a_transposed_tensor_is_read_by_columns(
    step: int, band_bytes: int, source: LazyTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggtool.conversion.tensors._BAND_BYTES", band_bytes)
    found = in_pieces(ModelTensor("t", source, source.raw.T, (32, 24)), step)
    np.testing.assert_array_equal(found, STORED.T.astype(np.float32))
    assert found.flags.c_contiguous


@pytest.mark.parametrize("step", [1, 5, 100])
def test_permuted_rows_are_picked_without_copying_the_tensor(step: int, source: LazyTensor) -> None:
    # As rotary heads are stored: (head, half, row) -> (head, row, half).
    view = source.raw.reshape(2, 2, 6, 32).swapaxes(1, 2)
    assert np.shares_memory(view, source.raw)
    found = in_pieces(ModelTensor("p", source, view, (24, 32)), step)
    np.testing.assert_array_equal(found, view.reshape(24, 32).astype(np.float32))


def test_a_vector_is_one_row(source: LazyTensor) -> None:
    vector = ModelTensor("v", source, source.raw[3], (32,))
    assert (vector.n_rows, vector.n_per_row) == (1, 32)
    np.testing.assert_array_equal(vector.rows(0, 1), STORED[3:4].astype(np.float32))
