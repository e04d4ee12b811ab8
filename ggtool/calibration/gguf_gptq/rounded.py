"""A matrix rounded to a tensor type of `ROUNDED_TYPES`, as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.calibration.gguf_gptq.matrix import Costs, descend, round_matrix
from ggtool.calibration.gguf_gptq.vectors import descend_vectors, round_vectors
from ggtool.gguf import vectors
from ggtool.gguf.grids import GRIDS, join_rows, split_rows

Floats = npt.NDArray[np.float32]


def round_bytes(
    type_name: str, weights: Floats, cost: Costs, importance: Floats | None, threads: int
) -> npt.NDArray[Any]:
    """Round `weights` (n_rows, n_columns) to a type of `ROUNDED_TYPES`; return its bytes, row after row."""
    if type_name == vectors.TYPE_NAME:
        return vectors.join_vectors(round_vectors(weights, cost, importance, threads))
    return join_rows(type_name, round_matrix(type_name, weights, cost, importance, threads))


def refine_bytes(
    type_name: str, data: npt.NDArray[Any], weights: Floats, cost: Costs, threads: int
) -> npt.NDArray[Any]:
    """Return bytes of less error than `data`, which are of a type of `ROUNDED_TYPES`."""
    n_columns = weights.shape[1]
    if type_name == vectors.TYPE_NAME:
        found = descend_vectors(vectors.split_vectors(data, n_columns), weights, cost, threads)
        return vectors.join_vectors(found)
    return join_rows(
        type_name, descend(GRIDS[type_name], split_rows(type_name, data, n_columns), weights, cost, threads)
    )
