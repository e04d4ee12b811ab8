"""The weights of a GGUF file as float32, some rows at a time, whatever type they are stored in."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ggtool.conversion.ggml import dequantize_rows
from ggtool.errors import ArtifactError
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.model import Artifact
from ggtool.gguf.tensor_types import row_bytes

_CHUNK_BYTES = 1 << 23
# Types that hold something else than weights, which ggml does not turn into float32.
NOT_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64"})


def n_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a tensor, 1 for a vector."""
    return math.prod(shape[:-1])


def rows_at_once(n_per_row: int) -> int:
    """Return how many rows make a piece of 8 MiB in float32, at least one."""
    return max(1, _CHUNK_BYTES // (4 * n_per_row))


def read_rows(artifact: Artifact, tensor: TensorInfo) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield (first row, rows as float32 (n, n_per_row)) of a tensor from its first row to its last.

    Raises ArtifactError for a type that holds no weights, and for a file that became shorter.
    """
    total, step = n_rows(tensor.shape), rows_at_once(tensor.shape[-1])
    for first in range(0, total, step):
        yield first, rows_between(artifact, tensor, first, min(first + step, total))


def rows_between(artifact: Artifact, tensor: TensorInfo, begin: int, end: int) -> npt.NDArray[np.float32]:
    """Read rows begin to end of a tensor as float32 (end - begin, n_per_row).

    Raises ArtifactError for a type that holds no weights, and for a file that became shorter.
    """
    if tensor.type_name in NOT_WEIGHTS:
        raise ArtifactError(
            f"{artifact.path}: {tensor.name} is made of {tensor.type_name}, which is not for weights."
        )
    n_per_row = tensor.shape[-1]
    size = row_bytes(tensor.type_name, n_per_row)
    with artifact.file_of(tensor).open("rb") as file:
        file.seek(tensor.offset + begin * size)
        data = np.fromfile(file, np.uint8, (end - begin) * size)
    if data.nbytes != (end - begin) * size:
        raise ArtifactError(f"{artifact.path} was cut short while it was read.")
    return dequantize_rows(tensor.type_name, data, n_per_row)
