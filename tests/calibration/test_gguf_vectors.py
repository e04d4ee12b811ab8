"""IQ3_S, four weights to a code: taken apart and put together again, searched as the definition says, closer under the Hessian."""

from __future__ import annotations

import numpy as np
import pytest

from ggtool.calibration.gguf_gptq.matrix import costs
from ggtool.calibration.gguf_gptq.rounded import refine_bytes, round_bytes
from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.gguf.vectors import book, join_vectors, split_vectors
from ggtool.kernels import vector_search

Floats = np.ndarray


def _matrix(n_rows: int, n_columns: int) -> tuple[Floats, Floats]:
    """Return weights and a Hessian whose inputs go together."""
    random = np.random.default_rng(1)
    inputs = random.standard_normal((1024, 16)) @ random.standard_normal((16, n_columns))
    inputs += random.standard_normal(inputs.shape)
    return random.standard_normal((n_rows, n_columns)).astype(np.float32), (inputs.T @ inputs / 1024).astype(
        np.float32
    )


def test_numbers_are_taken_out_and_put_back_as_llama_cpp_reads_them() -> None:
    weights, hessian = _matrix(5, 512)
    data = quantize_rows("IQ3_S", weights, hessian.diagonal().copy())
    found = split_vectors(data, 512)
    assert np.array_equal(found.values, dequantize_rows("IQ3_S", data, 512))
    assert np.array_equal(join_vectors(found), data)
    drawn = np.random.default_rng(0).integers(0, len(book()), found.codes.shape).astype(np.int32)
    found.codes[:] = drawn
    again = join_vectors(found)
    assert np.array_equal(split_vectors(again, 512).codes, drawn)
    assert np.array_equal(found.values, dequantize_rows("IQ3_S", again, 512))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_nearest_is_the_one_of_least_error(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_compiled:
        monkeypatch.setattr(vector_search, "_load", lambda: None)
    random = np.random.default_rng(2)
    root = random.standard_normal((4, 4)).astype(np.float32)
    metric = root @ root.T
    targets = (6 * random.standard_normal((37, 4))).astype(np.float32)
    scales = random.uniform(-1, 1, 37).astype(np.float32)
    scales[3] = 0
    found = vector_search.nearest(book(), metric, targets @ metric, scales, threads=2)
    for target, scale, code in zip(targets, scales, found, strict=True):
        away = target - scale * book()
        errors = np.einsum("ij,ij->i", away @ metric, away)
        assert errors[code] <= errors.min() + 1e-4 * abs(errors).max()


def test_a_matrix_has_half_the_error_of_llama_cpps_rounding_and_refining_never_raises_it() -> None:
    weights, hessian = _matrix(24, 512)
    cost, importance = costs(hessian), hessian.diagonal().copy()
    stock = quantize_rows("IQ3_S", weights, importance)
    ours = round_bytes("IQ3_S", weights, cost, importance, 1)
    refined = refine_bytes("IQ3_S", stock, weights, cost, 1)
    assert len(ours) == len(stock) == len(refined)
    errors = [cost.errors(dequantize_rows("IQ3_S", one, 512) - weights) for one in (ours, refined, stock)]
    assert errors[0].sum() < 0.5 * errors[2].sum()
    assert (errors[1] <= errors[2] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.7 * errors[2].sum()
