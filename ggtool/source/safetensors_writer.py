"""Write safetensors files tensor by tensor: every place is known beforehand, so nothing has to fit in memory.

The safetensors library's own writer takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.errors import OutputError
from ggtool.source.safetensors import INDEX_NAME, NUMPY_TYPES, SINGLE_NAME


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its name, its safetensors type (a key of NUMPY_TYPES), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize


def plan_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Return file name -> tensors, in their order, each file with at most `max_bytes` of them or with one tensor."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_index(folder: Path, shards: Mapping[str, Sequence[PlannedTensor]]) -> None:
    """Write the index that names each tensor's file, where there are several files."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.n_bytes for tensors in shards.values() for tensor in tensors)
    data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """One file that is filled tensor by tensor, in any order: use it in a `with` block.

    Without `claim` the file takes no room on the disk before it is written to.
    """

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor], *, claim: bool = True) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.places: dict[str, tuple[PlannedTensor, int]] = {}
        end = 0
        for tensor in tensors:
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.n_bytes],
            }
            self.places[tensor.name] = (tensor, end)
            end += tensor.n_bytes
        header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        header += b" " * (-len(header) % 8)
        self.path, self.begin = path, 8 + len(header)
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            try:
                if claim:  # a full disk is an error here, and not a signal while a page is written
                    os.posix_fallocate(file.fileno(), self.begin, max(1, end))
            except OSError as error:
                raise OutputError(
                    f"{path.parent} has no room for {end:,} bytes of weights: {error.strerror}."
                ) from None
            file.truncate(self.begin + end)

    def __enter__(self) -> ShardWriter:
        with self.path.open("r+b") as file:
            self.data = mmap.mmap(file.fileno(), 0)
        return self

    def __exit__(self, *_error: object) -> None:
        self.data.flush()
        # Arrays that look into the mapping may outlive this block; the mapping goes with the last of them.
        del self.data

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor's place in the file, to be written to; a bfloat16 is a uint16."""
        tensor, offset = self.places[name]
        return np.ndarray(
            tensor.shape, NUMPY_TYPES[tensor.dtype], buffer=self.data, offset=self.begin + offset
        )

    def release(self) -> None:
        """Let the kernel write out and take back what was written so far."""
        self.data.flush()
        self.data.madvise(mmap.MADV_DONTNEED)
