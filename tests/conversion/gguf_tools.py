"""What the convert tests share: llama.cpp's own quantizer, called in this process, and raw tensor bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ggtool.gguf.imatrix import Entry, ImportanceMatrix
from ggtool.gguf.model import is_matrix
from ggtool.gguf.reader import read_header


class _Data(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def llama_quantize(
    source: Path, targets: Mapping[int, Path], imatrix: ImportanceMatrix | None = None, **rules: Any
) -> None:
    """Have llama.cpp quantize the F32 file `source` into {ftype: file}, `rules` being fields of its parameters.

    In this process, for the tables of the IQ types take ten seconds to make and are made once a process.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 1
    entries = imatrix.entries if imatrix is not None else {}
    arrays = {name.encode(): entry.weights().reshape(-1) for name, entry in entries.items()}
    rows = [(name, array.ctypes.data, array.size) for name, array in arrays.items()]
    data = (_Data * (len(rows) + 1))(*rows, (None, None, 0))
    if rows:
        params.imatrix = ctypes.cast(data, type(params.imatrix))
    pairs = [(pattern.encode(), number) for pattern, number in rules.pop("tensor_types", [])]
    overrides = (_Override * (len(pairs) + 1))(*pairs, (None, 1000))
    if pairs:
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    for field, value in rules.items():
        setattr(params, field, value)
    for ftype, target in targets.items():
        params.ftype = ftype
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
        assert code == 0, f"llama_model_quantize refuses ftype {ftype}"


def random_imatrix(f32: Path) -> ImportanceMatrix:
    """An importance matrix as llama-imatrix makes them, for the matrices of an F32 file's blocks."""
    random = np.random.default_rng(5)
    entries = {}
    for tensor in read_header(f32).tensors:
        if tensor.name.startswith("blk.") and is_matrix(tensor.name, tensor.shape):
            sums = 1000 * random.chisquare(1, (1, tensor.shape[-1])).astype(np.float32)
            entries[tensor.name] = Entry(sums, np.array([1024]))
    return ImportanceMatrix("random.gguf", entries, ("text.txt",), 2, 512)


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a GGUF file: type, shape, data."""
    data = path.read_bytes()
    return {
        tensor.name: (tensor.type_name, tensor.shape, data[tensor.offset : tensor.offset + tensor.n_bytes])
        for tensor in read_header(path).tensors
    }
