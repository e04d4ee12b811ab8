"""Read a float GGUF file as the input of a conversion: its keys unchanged, its tensors memory-mapped."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import ArtifactError
from ggtool.gguf.header import ArrayRef, GGUFHeader
from ggtool.gguf.reader import read_header
from ggtool.source.safetensors import LazyTensor

# F64 aside: no converter writes it.
_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def read_floats(path: Path, named: Path) -> tuple[dict[str, GGUFValue], list[ModelTensor]]:
    """Map the file at `path`, which may be deleted afterwards; error messages name `named` instead.

    Raises ArtifactError for a damaged file or a tensor that is not a float type.
    """
    header = read_header(path)
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = []
    for tensor in header.tensors:
        if tensor.type_name not in _NUMPY_TYPES:
            raise ArtifactError(
                f"{named}: tensor {tensor.name} has the type {tensor.type_name}, which is not a float."
            )
        raw = np.ndarray(tensor.shape, _NUMPY_TYPES[tensor.type_name], buffer=data, offset=tensor.offset)
        source = LazyTensor(tensor.name, tensor.type_name, tensor.shape, named, raw, data, tensor.offset)
        tensors.append(ModelTensor(tensor.name, source, raw, tensor.shape))
    return {key: _value(header, key) for key in header.metadata}, tensors


def _value(header: GGUFHeader, key: str) -> GGUFValue:
    value, kind = header.metadata[key], GGUFValueType(header.types[key])
    if isinstance(value, ArrayRef):
        return GGUFValue(header.array(key), kind, GGUFValueType(value.type))
    return GGUFValue(value, kind)
