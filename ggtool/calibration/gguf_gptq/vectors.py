"""Round one matrix to IQ3_S, whose codes stand for four weights, so that the errors of its outputs are small, given its inputs' Hessian.

The error of a row is (q - w) H (q - w)'. Columns are rounded in order, four at a time, each four to the vector of the book that costs least once the columns
behind them have made up for it as well as they can: under the inverse of U' U, U the four's part of the Cholesky factor. Then a descent takes each four to the
best that the rest of the row leaves it, and d of each block to its least squares, for as long as the error falls. Scales are llama.cpp's own fit.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ggtool.calibration.gguf_gptq.matrix import Costs
from ggtool.conversion.ggml import quantize_rows
from ggtool.gguf.vectors import BLOCK, GROUP, SIZE, TYPE_NAME, Vectors, book, split_vectors
from ggtool.kernels.vector_search import nearest

Floats = npt.NDArray[np.float32]
_ROUNDS = 2


def round_vectors(weights: Floats, cost: Costs, importance: Floats | None, threads: int) -> Vectors:
    """Round `weights` (n_rows, n_columns); importance: float32 (n_columns,), what llama.cpp weighs its fit of the scales with."""
    vectors = split_vectors(quantize_rows(TYPE_NAME, weights, importance), weights.shape[1])
    return descend_vectors(_sweep(vectors, weights, cost, threads), weights, cost, threads)


def descend_vectors(vectors: Vectors, weights: Floats, cost: Costs, threads: int) -> Vectors:
    """Return vectors of no more error, from those that are there."""
    codes, d, hessian = vectors.codes.copy(), vectors.d.copy(), cost.hessian
    gradient = np.asarray((vectors.values - weights) @ hessian, np.float32)
    for _ in range(_ROUNDS):
        sizes = replace(vectors, d=d).sizes
        for start in range(0, weights.shape[1], SIZE):
            four, at = slice(start, start + SIZE), start // SIZE
            metric, size = hessian[four, four], sizes[:, start // GROUP]
            held = size[:, None] * book()[codes[:, at]]
            # The error is least where its gradient vanishes, all other columns staying as they are: at held - gradient / metric.
            pulled = np.asarray(held @ metric - gradient[:, four], np.float32)
            codes[:, at] = nearest(book(), metric, pulled, size, threads)
            gradient += (size[:, None] * book()[codes[:, at]] - held) @ hessian[four]
        _fit_d(replace(vectors, codes=codes, d=d), gradient, hessian)
    return replace(vectors, codes=codes, d=d)


def _sweep(vectors: Vectors, weights: Floats, cost: Costs, threads: int) -> Vectors:
    work, codes, sizes, factor = weights.copy(), vectors.codes.copy(), vectors.sizes, cost.factor
    for begin in range(0, weights.shape[1], BLOCK):
        end = begin + BLOCK
        errors = np.empty((len(work), BLOCK), np.float32)
        for start in range(begin, end, SIZE):
            four, at = slice(start, start + SIZE), start // SIZE
            turned = np.linalg.inv(factor[four, four].astype(np.float64)).astype(np.float32)
            metric, size = turned @ turned.T, sizes[:, start // GROUP]
            codes[:, at] = nearest(book(), metric, work[:, four] @ metric, size, threads)
            error = (work[:, four] - size[:, None] * book()[codes[:, at]]) @ turned
            errors[:, start - begin : start - begin + SIZE] = error
            work[:, start + SIZE : end] -= error @ factor[four, start + SIZE : end]
        work[:, end:] -= errors @ factor[begin:end, end:]
    return replace(vectors, codes=codes)


def _fit_d(vectors: Vectors, gradient: Floats, hessian: Floats) -> None:
    """Take d of each block to the float16 of least error, in place, and the gradient with it."""
    values, d = vectors.values, vectors.d
    for at in range(d.shape[1]):
        columns = slice(at * BLOCK, (at + 1) * BLOCK)
        held = values[:, columns]
        slope = np.einsum("ij,ij->i", held, gradient[:, columns])
        bend = np.einsum("ij,ij->i", held @ hessian[columns, columns], held)
        wanted = d[:, at] * (1 - slope / np.where(bend > 0, bend, 1))
        fitted = wanted.astype(np.float16).astype(np.float32)
        step = np.divide(fitted, d[:, at], out=np.ones_like(fitted), where=d[:, at] != 0) - 1
        step[~((2 * step * slope + step * step * bend < 0) & np.isfinite(fitted))] = 0
        d[:, at] = np.where(step != 0, fitted, d[:, at])
        gradient += (step[:, None] * held) @ hessian[columns]
