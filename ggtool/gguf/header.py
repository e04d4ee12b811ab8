"""The header of a GGUF file: keys, tensors, where the data is. `ggtool.gguf.reader` reads it.

    header.metadata[key]        scalars and strings; an ArrayRef for an array
    header.array(key)           the elements of an array
    header.spans[key]           where the pair is: start, start of the value, end
    header.tensors              TensorInfo: name, shape, type, absolute offset, size

Arrays stay in the file until asked for. No weight is read here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ggtool.errors import ArtifactError
from ggtool.formats import qtypes
from ggtool.gguf import strings
from ggtool.gguf.problems import Problem
from ggtool.gguf.tensor_types import SCALARS, STRING

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
# Well above any real model; it bounds the time a hostile header takes.
MAX_PARTS = 65_535

# Names of general.file_type that ggtool reads and does not make.
_OTHER_FILE_TYPES: Mapping[int, str] = MappingProxyType({39: "NVFP4", 1024: "GUESSED"})


class Span(NamedTuple):
    """Where a key-value pair is in the file: its first byte, the first of the value (behind the type), its end."""

    start: int
    value: int
    end: int


@dataclass(frozen=True)
class ArrayRef:
    """An array that stays in the file: element type (GGUF's number), element count, where, how long."""

    type: int
    length: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as numpy has it (rows first; GGUF stores the reverse), `offset` from the file's start.

    `entry` is where its description is in the header: first byte and end.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int
    entry: tuple[int, int] = (0, 0)

    @property
    def n_params(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file but the weights.

    Attributes:
        path: the file; of one on a server, its name.
        version: of the format, 1 to 3.
        alignment: of tensor data, in bytes.
        metadata: scalars and strings, and an ArrayRef per array, in the file's order.
        tensors: in the file's order.
        data_offset: where the data section begins.
        types: the value's type by key, as GGUF numbers them.
        spans: where each pair is.
        size: the length of the whole file in bytes.
        problems: what is wrong and does not keep the rest from being read; empty after `read_header`.

    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    types: Mapping[str, int]
    spans: Mapping[str, Span] = field(repr=False)
    size: int
    problems: tuple[Problem, ...] = ()
    # The arrays of a file that cannot be opened again, such as one on a server.
    kept: Mapping[str, bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def n_parts(self) -> int:
        """How many files the model is split into; 1 when it is not."""
        count = self.metadata.get("split.count")
        return count if type(count) is int and 1 < count <= MAX_PARTS else 1

    @property
    def architecture(self) -> str:
        """general.architecture, such as "gpt2"; empty when the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def file_type(self) -> str:
        """The quant type's name ("Q4_K_M") for general.file_type; "unknown" when none has that number."""
        number = self.metadata.get("general.file_type")
        names: dict[Any, str] = {row.ftype: row.name for row in qtypes()}
        names.update(_OTHER_FILE_TYPES)
        return names.get(number, "unknown") if type(number) is int else "unknown"

    @property
    def data_end(self) -> int:
        """The end of the last tensor's data, without padding; the data section's start if there are no tensors."""
        return max((tensor.offset + tensor.n_bytes for tensor in self.tensors), default=self.data_offset)

    def array(self, key: str) -> list[Any]:
        """Read one metadata array, such as "tokenizer.ggml.tokens"; ArtifactError if the key has none."""
        ref = self.metadata.get(key)
        if not isinstance(ref, ArrayRef):
            raise ArtifactError(f"{self.path} has no array {key}.")
        data = self._read(key, ref)
        if ref.type == STRING:
            return strings.split(data, ref.length, 4 if self.version == 1 else 8)
        return list(struct.unpack(f"<{ref.length}{SCALARS[ref.type][1]}", data))

    def _read(self, key: str, ref: ArrayRef) -> bytes:
        if self.kept is not None:
            return self.kept[key]
        try:
            with self.path.open("rb") as file:
                file.seek(ref.offset)
                data = file.read(ref.n_bytes)
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}.") from None
        if len(data) != ref.n_bytes:
            raise ArtifactError(f"{self.path} was cut short while it was read.")
        return data
