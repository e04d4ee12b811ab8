"""A token drawn from a row of logits in C++ (`cpu/sampling.cpp`): 10 µs for 50,000 logits, where numpy takes 80 and more.

Nothing here compiles while a text waits: `prepare` does, in a thread of its own, and until it has there is no draw in C++.
"""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.kernels.build import library

_loaded: list[Any] = []


def prepare() -> threading.Thread:
    """Load the library, compiled first where the cache has none, without waiting for it; return the thread that does."""
    thread = threading.Thread(target=_load, daemon=True)
    thread.start()
    return thread


def draw(
    row: npt.NDArray[np.float32], top_k: int, top_p: float, min_p: float, temperature: float, stream: int
) -> int | None:
    """Return a token of float32 logits (n_vocab,), contiguous; None where the library is not there or a logit is no number.

    `ggtool.serve.engine.sampler` says how it is drawn; `stream` is the 64 bits that the noise of this step comes from. The
    largest where that is infinite.
    """
    if not _loaded:
        return None
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    token: int = _loaded[0](row.ctypes.data, len(row), top_k, top_p, log_min_p, temperature, stream)
    return token if token >= 0 else None


def _load() -> None:
    opened = library()
    if opened is None or _loaded:
        return
    function = opened.ggtool_draw
    size, number = ctypes.c_int64, ctypes.c_double
    function.argtypes = [ctypes.c_void_p, size, size, number, number, number, ctypes.c_uint64]
    function.restype = size
    _loaded.append(function)
