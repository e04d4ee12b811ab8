"""The nearest of a book of vectors under a quadratic error, row by row, in C++ (`cpu/vector_search.cpp`), or in numpy without a compiler."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.kernels.build import library

Floats = npt.NDArray[np.float32]
# Numbers of a vector, which the C++ counts on.
SIZE = 4
_ROWS_AT_ONCE = 64


def nearest(
    book: Floats, metric: Floats, pulled: Floats, scales: Floats, threads: int
) -> npt.NDArray[np.int32]:
    """Return for each row the place k of least (t - s b) M (t - s b)' with b = book[k], int32 (n_rows,).

    book: (n, SIZE). metric: M, symmetric (SIZE, SIZE). pulled: t M, (n_rows, SIZE). scales: s, (n_rows,).
    """
    norms = np.einsum("ij,ij->i", book @ metric, book).astype(np.float32)
    pulled, scales = (np.ascontiguousarray(one, np.float32) for one in (pulled, scales))
    found = np.empty(len(pulled), np.int32)
    search = _load()

    def some(first: int, last: int) -> None:
        if search is not None:
            search(
                book.ctypes.data,
                norms.ctypes.data,
                len(book),
                pulled[first:].ctypes.data,
                scales[first:].ctypes.data,
                found[first:].ctypes.data,
                last - first,
            )
            return
        for at in range(first, last, _ROWS_AT_ONCE):
            rows = slice(at, min(at + _ROWS_AT_ONCE, last))
            size = scales[rows, None]
            found[rows] = (size * size * norms - 2 * size * (pulled[rows] @ book.T)).argmin(1)

    step = max(16, -(-len(pulled) // threads) // 16 * 16)
    starts = range(0, len(pulled), step)
    if threads == 1 or len(starts) == 1:
        some(0, len(pulled))
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="nearest") as pool:
            list(pool.map(lambda first: some(first, min(first + step, len(pulled))), starts))
    return found


@functools.cache
def _load() -> Any | None:
    opened = library()
    if opened is None:
        return None
    function = opened.ggtool_nearest_vector
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, count, pointer, pointer, pointer, count]
    function.restype = None
    return function
