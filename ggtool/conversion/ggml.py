"""ctypes bindings to libggml's quantizers in llama-cpp-python's libraries, without importing llama_cpp.

`ggml_quantize_chunk` is the code that llama-quantize runs. A row's bytes depend on that row alone, so rows may be
quantized in any order, in pieces of any size and on any thread; ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggtool.errors import ArtifactError
from ggtool.gguf.tensor_types import TYPE_NUMBERS, row_bytes
from ggtool.system.llama_library import library_file


def library_path(name: str) -> Path:
    """Return the file of one of llama.cpp's libraries ("ggml-base", "llama"), ArtifactError where there is none."""
    path = library_file(name)
    if path is None:
        raise ArtifactError("llama-cpp-python is not installed; install ggtool again.")
    if not path.exists():
        raise ArtifactError(f"there is no {path}; install llama-cpp-python again.")
    return path


def quantize_rows(
    type_name: str, rows: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantize C-contiguous finite `rows` (n_rows, n_per_row) to `type_name`; return the bytes, row after row.

    `importance` (n_per_row,) weights the errors. IQ1_S, IQ2_XXS and IQ2_XS require it: ggml aborts the process without it.
    """
    n_rows, n_per_row = rows.shape
    if type_name == "F32":
        return rows.reshape(-1).view(np.uint8)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    if importance is not None:
        assert importance.dtype == np.float32
        assert importance.shape == (n_per_row,)
        assert importance.flags.c_contiguous
    out = np.empty(n_rows * row_bytes(type_name, n_per_row), np.uint8)
    if type_name == "F16":
        # The same rounding with the processor's own instruction, 30 times as fast as ggml_quantize_chunk.
        _cpu_library().ggml_cpu_fp32_to_fp16(rows.ctypes.data, out.ctypes.data, rows.size)
        return out
    written = _library().ggml_quantize_chunk(
        TYPE_NUMBERS[type_name],
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_per_row,
        None if importance is None else importance.ctypes.data,
    )
    assert written == out.nbytes, f"ggml made {written} bytes of {type_name} and not {out.nbytes}"
    return out


def dequantize_rows(type_name: str, data: npt.NDArray[np.uint8], n_per_row: int) -> npt.NDArray[np.float32]:
    """Dequantize bytes of a tensor type to float32 (n_rows, n_per_row)."""
    if type_name == "F32":
        return data.view(np.float32).reshape(-1, n_per_row)
    n_rows = data.nbytes // row_bytes(type_name, n_per_row)
    out = np.empty((n_rows, n_per_row), np.float32)
    traits = _library().ggml_get_type_traits(TYPE_NUMBERS[type_name]).contents
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def valid(type_name: str, data: npt.NDArray[np.uint8]) -> bool:
    """Whether ggml's row validation accepts `data`: all scales and values finite."""
    return bool(_library().ggml_validate_row_data(TYPE_NUMBERS[type_name], data.ctypes.data, data.nbytes))


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h, up to `to_float`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path("ggml-base")))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library


@cache
def _cpu_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path("ggml-cpu")))
    library.ggml_cpu_fp32_to_fp16.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.ggml_cpu_fp32_to_fp16.restype = None
    return library
