"""A GGUF model as it is looked at: the headers of all its parts, from a file here, a URL or the Hub.

Unlike `ggtool.gguf.model.open_artifact` this opens what is damaged too, as far as it can be understood; what is wrong is
in `problems`. A file that is one part of a model, and not the first, is looked at alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggtool.conversion.ggml import dequantize_rows
from ggtool.errors import ArtifactError, UsageError
from ggtool.gguf.header import GGUFHeader, TensorInfo
from ggtool.gguf.model import part_name
from ggtool.gguf.problems import Problem
from ggtool.gguf.reader import examine_header, examine_source
from ggtool.gguf.remote import Place, RangeSource, parse_place
from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

# Two MiB as float32: what numpy works on without leaving the cache.
_PIECE_WEIGHTS = 1 << 19
# ggml has no way back to floats from these two, which are for products and not for files.
WITHOUT_FLOATS = frozenset({"Q8_1", "Q8_K"})
_NUMPY_TYPES = {"F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class Part:
    """One file of the model: its header, and where it is if it is here."""

    header: GGUFHeader
    path: Path | None


@dataclass(frozen=True)
class Opened:
    """A model that is looked at. `name` is what the user called it; n_fetched are bytes taken from a server."""

    name: str
    parts: tuple[Part, ...]
    n_fetched: int = 0

    @cached_property
    def header(self) -> GGUFHeader:
        """The first part's header with the tensors of all; offsets are those in their own files."""
        return replace(self.parts[0].header, tensors=tuple(tensor for tensor, _ in self.tensors))

    @cached_property
    def tensors(self) -> tuple[tuple[TensorInfo, Part], ...]:
        """Every tensor with the part that holds it."""
        return tuple((tensor, part) for part in self.parts for tensor in part.header.tensors)

    @property
    def is_local(self) -> bool:
        """Whether the weights can be read."""
        return all(part.path is not None for part in self.parts)

    @property
    def path(self) -> Path:
        """The first file; UsageError if the model is on a server."""
        path = self.parts[0].path
        if path is None:
            raise UsageError(
                f"{self.name} is not on this machine; only its header was read. Download it first."
            )
        return path

    @property
    def n_bytes(self) -> int:
        """The size of all files."""
        return sum(part.header.size for part in self.parts)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with any part, and with the parts together."""
        found = [problem for part in self.parts for problem in part.header.problems]
        return (*found, *_disagreements(self.parts))


def open_model(name: str, revision: str | None = None) -> Opened:
    """Open a path, a URL or OWNER/NAME/FILE.gguf on the Hub; parts of a split model are followed from the first.

    Raises ArtifactError or MalformedError for a file that cannot be read to the end of its header, HubError where a server
    does not give it.
    """
    path = Path(name).expanduser()
    place = None if path.exists() else parse_place(name, revision)
    if place is not None:
        return _open_remote(name, place)
    if revision:
        raise UsageError(f"--revision is for a file on the Hub, and {name} is a path.")
    if not path.exists():
        raise ArtifactError(
            f"there is no file {name}; give a path, a URL, or OWNER/NAME/FILE.gguf on the Hub."
        )
    first = examine_header(path)
    parts = [Part(first, path)]
    for other in other_parts(path.name, first):
        sibling = path.with_name(other)
        if not sibling.exists():
            raise ArtifactError(
                f"{path} is the first of {first.n_parts} parts, and {other} is missing beside it."
            )
        parts.append(Part(examine_header(sibling), sibling))
    return Opened(name, tuple(parts))


def other_parts(file_name: str, header: GGUFHeader) -> list[str]:
    """Return the names of the other parts if this is the first part of a split model by its key and its name."""
    count, ending = header.n_parts, part_name("", 1, header.n_parts)
    if count == 1 or header.metadata.get("split.no") != 0 or not file_name.endswith(ending):
        return []
    stem = file_name.removesuffix(ending)
    return [part_name(stem, number, count) for number in range(2, count + 1)]


def pieces(part: Part, tensor: TensorInfo) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the weights of a tensor as float32, some rows at a time, flat.

    Raises ArtifactError where the file does not hold them, UsageError for a type that ggml does not turn into floats.
    """
    if tensor.type_name in WITHOUT_FLOATS:
        raise UsageError(
            f"tensor {tensor.name} is {tensor.type_name}, which ggml does not turn back into floats."
        )
    n_per_row = tensor.shape[-1]
    for data in raw_pieces(part, tensor):
        if tensor.type_name in _NUMPY_TYPES:
            yield data.view(_NUMPY_TYPES[tensor.type_name]).astype(np.float32)
        else:
            yield dequantize_rows(tensor.type_name, data, n_per_row).reshape(-1)


def raw_pieces(part: Part, tensor: TensorInfo) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of a tensor, whole rows at a time (or a part of a row, whole blocks, where rows are long)."""
    assert part.path is not None
    _, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[tensor.type_name]]
    row = tensor.shape[-1] // block * block_bytes
    step = max(1, _PIECE_WEIGHTS // tensor.shape[-1]) * row
    with part.path.open("rb") as file:
        for start in range(0, tensor.n_bytes, step):
            n_bytes = min(step, tensor.n_bytes - start)
            data = os.pread(file.fileno(), n_bytes, tensor.offset + start)
            if len(data) != n_bytes:
                raise ArtifactError(f"{part.path} ends inside tensor {tensor.name}; get it again.")
            # A copy: a float32 view must begin at a multiple of 4, and bytes objects are read-only.
            yield np.frombuffer(bytearray(data), np.uint8)


def _open_remote(name: str, place: Place) -> Opened:
    source = RangeSource(place)
    first = examine_source(source, Path(place.file_name), keep_arrays=True)
    parts, n_fetched = [Part(first, None)], source.n_fetched
    for other in other_parts(place.file_name, first):
        source = RangeSource(place.sibling(other))
        parts.append(Part(examine_source(source, Path(other), keep_arrays=True), None))
        n_fetched += source.n_fetched
    return Opened(name, tuple(parts), n_fetched)


def _disagreements(parts: tuple[Part, ...]) -> Iterator[Problem]:
    if len(parts) == 1:
        return
    for number, part in enumerate(parts):
        header = part.header
        if (header.metadata.get("split.no"), header.n_parts) != (number, len(parts)):
            yield Problem(
                "split", f"{header.path.name} is not part {number + 1} of {len(parts)}, as its name says"
            )
    n_tensors = sum(len(part.header.tensors) for part in parts)
    wanted = parts[0].header.metadata.get("split.tensors.count", n_tensors)
    if n_tensors != wanted:
        yield Problem("split", f"the parts hold {n_tensors} tensors and should hold {wanted}")
    names = [tensor.name for part in parts for tensor in part.header.tensors]
    if len(set(names)) != len(names):
        yield Problem("split", "two parts hold a tensor of the same name")
