"""Relative quantization error of a tensor type on a tensor, measured with the real quantizer.

error = sum of w * (quantized - original)^2 / sum of w * original^2, w being the importance of a weight's input
(1 without any): the share of a matrix product's energy that becomes noise. Long tensors are sampled: 32 runs of
rows evenly spread, 2^18 weights in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.conversion.tensors import ModelTensor

_SAMPLED_WEIGHTS = 1 << 18
_RUNS = 32


def measure_errors(
    tensor: ModelTensor, type_names: Sequence[str], importance: npt.NDArray[np.float32] | None
) -> dict[str, float]:
    """Return {tensor type: relative error}; `importance` is (n_matrices, n_per_row)."""
    noise = dict.fromkeys(type_names, 0.0)
    energy = 0.0
    for begin, end, own in sampled_runs(tensor, importance):
        rows = tensor.rows(begin, end)
        weights = np.ones(tensor.n_per_row, np.float32) if own is None else own
        energy += energy_of(rows, weights)
        for name in type_names:
            noise[name] += energy_of(round_trip(name, rows, own) - rows, weights)
    tensor.source.release()
    return {name: value / energy if energy else 0.0 for name, value in noise.items()}


def round_trip(
    type_name: str, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Quantize `rows` (n_rows, n_per_row) to a tensor type and back."""
    return dequantize_rows(type_name, quantize_rows(type_name, rows, importance), rows.shape[1])


def energy_of(rows: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> float:
    """Return the sum of the squares of `rows` (n_rows, n_per_row), each column times its weight (n_per_row,)."""
    return float(np.square(rows, dtype=np.float64).sum(axis=0) @ weights)


def sampled_runs(
    tensor: ModelTensor, importance: npt.NDArray[np.float32] | None
) -> list[tuple[int, int, npt.NDArray[np.float32] | None]]:
    """Return the runs of rows that stand for a tensor: (begin, end, importance of each weight of a row)."""
    n_matrices = 1 if importance is None else len(importance)
    per_matrix = tensor.n_rows // n_matrices
    length = max(1, min(per_matrix, _SAMPLED_WEIGHTS // _RUNS // tensor.n_per_row))
    n_runs = min(_RUNS, -(-tensor.n_rows // length))
    found = []
    for run in range(n_runs):
        begin = run * tensor.n_rows // n_runs
        matrix = begin // per_matrix
        end = min(begin + length, (matrix + 1) * per_matrix)
        found.append((begin, end, None if importance is None else importance[matrix]))
    return found
