"""Rounding to the grids of GGUF's tensor types under an output error, in C++ (`cpu/rounding.cpp`), or in numpy without a compiler.

The error of a row is (q - w) H (q - w)' for weights w, rounded weights q and the Hessian H. Rows are independent and are
shared out among threads. The numpy versions make the same moves on all rows at once; sums are rounded in another order,
so that a code may differ where two are as good.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.kernels import rounding_numpy
from ggtool.kernels.build import library

Floats = npt.NDArray[np.float32]
_MAX_LEVELS = 256


class _Grid(ctypes.Structure):
    _fields_ = (
        ("n_levels", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("least_scale", ctypes.c_int32),
        ("largest_scale", ctypes.c_int32),
        ("max_minimum", ctypes.c_int32),
        ("levels", ctypes.c_float * _MAX_LEVELS),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("n_rows", ctypes.c_int64),
        ("n_columns", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("d", ctypes.c_void_p),
        ("dmin", ctypes.c_void_p),
    )


def feedback(
    grid: rounding_numpy.GridLike,
    parts: rounding_numpy.PartsLike,
    work: Floats,
    factor: Floats,
    start: int,
    stop: int,
    threads: int,
) -> Floats:
    """Round columns start to stop of `work` (n_rows, n_columns) to `parts`' scales; its codes and `work` change.

    factor: upper U (n_columns, n_columns) with U.T @ U the inverse of H. Each error is fed into the columns after it up to
    `stop`. Returns the errors over U[j, j], (n_rows, stop - start), for the columns from `stop` on.
    """
    library = _load()
    errors = np.empty((len(work), stop - start), np.float32)
    if library is None:
        rounding_numpy.feedback(grid, parts, work, factor, errors, start, stop)
        return errors
    own = _grid(grid)

    def some(first: int, last: int) -> float:
        rows = _rows(parts, first, last)
        library.ggtool_feedback(
            ctypes.byref(own),
            ctypes.byref(rows),
            work[first:].ctypes.data,
            factor.ctypes.data,
            errors[first:].ctypes.data,
            start,
            stop,
        )
        return 0.0

    _shared(some, len(work), threads)
    return errors


def descend(
    grid: rounding_numpy.GridLike,
    parts: rounding_numpy.PartsLike,
    gradient: Floats,
    hessian: Floats,
    *,
    n_rounds: int,
    reach: int,
    least: float,
    threads: int,
) -> float:
    """Lower the rows' error by moves that never raise it; `parts` and `gradient` change. Returns the error taken away.

    gradient: (q - w) H, (n_rows, n_columns). A round solves for d and dmin of each block by least squares, tries the integer scales within
    `reach` of each group's own (of a single-level type: factors of d), its codes rounded anew, and takes each code to its
    best in turn. A round that gains less than `least` of all before it is the last.
    """
    library = _load()
    if library is None:
        return rounding_numpy.descend(grid, parts, gradient, hessian, n_rounds, reach, least)
    own = _grid(grid)

    def some(first: int, last: int) -> float:
        rows = _rows(parts, first, last)
        gained: float = library.ggtool_descend(
            ctypes.byref(own),
            ctypes.byref(rows),
            gradient[first:].ctypes.data,
            hessian.ctypes.data,
            n_rounds,
            reach,
            least,
        )
        return gained

    return _shared(some, len(gradient), threads)


def _shared(some: Callable[[int, int], float], n_rows: int, threads: int) -> float:
    """Run `some` over slices of the rows, several for each thread, since rows take different times."""
    step = max(16, -(-n_rows // (4 * threads)) // 16 * 16)
    starts = range(0, n_rows, step)
    if threads == 1 or len(starts) == 1:
        return some(0, n_rows)
    with ThreadPoolExecutor(threads, thread_name_prefix="round") as pool:
        return sum(pool.map(lambda first: some(first, min(first + step, n_rows)), starts))


def _grid(grid: rounding_numpy.GridLike) -> _Grid:
    levels = (ctypes.c_float * _MAX_LEVELS)(*grid.levels)
    return _Grid(len(grid.levels), grid.group, grid.block, *grid.scales, grid.max_minimum, levels)


def _rows(parts: rounding_numpy.PartsLike, first: int, last: int) -> _Rows:
    arrays = (parts.codes, parts.scales, parts.minimums, parts.d, parts.dmin)
    assert all(array.flags.c_contiguous for array in arrays)
    return _Rows(last - first, parts.codes.shape[1], *(array[first:].ctypes.data for array in arrays))


@functools.cache
def _load() -> Any | None:
    opened = library()
    if opened is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    opened.ggtool_feedback.argtypes = [
        ctypes.POINTER(_Grid),
        ctypes.POINTER(_Rows),
        pointer,
        pointer,
        pointer,
        count,
        count,
    ]
    opened.ggtool_feedback.restype = None
    opened.ggtool_descend.argtypes = [
        ctypes.POINTER(_Grid),
        ctypes.POINTER(_Rows),
        pointer,
        pointer,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_double,
    ]
    opened.ggtool_descend.restype = ctypes.c_double
    return opened
