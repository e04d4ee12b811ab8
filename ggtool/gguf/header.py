"""The header of a GGUF file, read in bounded time and memory: keys, tensors, where the data is.

The file is taken for hostile: every count is checked against the bytes that are left before anything is
read, and each way of being broken that is met in practice is named. Arrays stay in the file until asked
for. No weight is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf.constants import GGUFValueType, LlamaFileType

from ggtool.errors import ArtifactError
from ggtool.formats import qtypes
from ggtool.gguf.tensor_types import TENSOR_TYPES

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32


# Far above any real model; what bounds the time a hostile header can take.
_MAX_KEYS, _MAX_TENSORS, _MAX_ELEMENTS = 1 << 16, 1 << 20, 1 << 24
_MAX_NAME_BYTES, _MAX_STRING_BYTES = 65_535, 1 << 26
_MAX_DIMS = 4
_VERSIONS = (2, 3)

_ARRAY, _STRING, _BOOL = int(GGUFValueType.ARRAY), int(GGUFValueType.STRING), int(GGUFValueType.BOOL)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_OTHER_KINDS = (
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "it is an HTML page, probably a failed download; get it again"),
    (b"lmgg", "it is in the GGML format that came before GGUF; convert the original again"),
    (b"fmgg", "it is in the GGMF format that came before GGUF; convert the original again"),
    (b"tjgg", "it is in the GGJT format that came before GGUF; convert the original again"),
    (b"\0\0\0\0", "its header is all zeros, so the program that wrote it was stopped; make it again"),
)


@dataclass(frozen=True)
class ArrayRef:
    """An array that stays in the file: element type (GGUF's number), element count, where, how long."""

    type: int
    length: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as numpy has it (rows first; GGUF stores the reverse), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int

    @property
    def n_params(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file but the weights.

    `metadata` holds scalars, and an ArrayRef per array; `types` the value's type by key, as GGUF numbers them.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    types: Mapping[str, int]

    @property
    def n_parts(self) -> int:
        """How many files the model is split into; 1 when it is not."""
        count = self.metadata.get("split.count")
        return count if type(count) is int and count > 1 else 1

    @property
    def architecture(self) -> str:
        """general.architecture, such as "gpt2"; empty when the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def file_type(self) -> str:
        """The quant type's name ("Q4_K_M") for general.file_type; "unknown" when there is none by that number."""
        # gguf-py names the quant types that ggtool reads and does not make.
        names: dict[Any, str] = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
        names.update({row.ftype: row.name for row in qtypes()})
        return names.get(self.metadata.get("general.file_type"), "unknown")

    def array(self, key: str) -> list[Any]:
        """Read one metadata array, such as "tokenizer.ggml.tokens"; ArtifactError if there is none by that key."""
        ref = self.metadata.get(key)
        if not isinstance(ref, ArrayRef):
            raise ArtifactError(f"{self.path} has no array {key}.")
        with self.path.open("rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.n_bytes)
        if len(data) != ref.n_bytes:
            raise ArtifactError(f"{self.path} was cut short while it was read.")
        if ref.type != _STRING:
            return list(struct.unpack(f"<{ref.length}{_SCALARS[ref.type]}", data))
        return _strings(data, ref.length)


def read_header(path: Path) -> GGUFHeader:
    """Read a GGUF v2 or v3 header; ArtifactError names the first thing that is wrong with the file."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            _check_kind(path, head)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}.") from None
    with data:
        return _Reader(path, data).header()


def _check_kind(path: Path, head: bytes) -> None:
    if head.startswith(MAGIC):
        return
    if not head:
        raise ArtifactError(f"{path} is empty; make it again.")
    known = (what for start, what in _OTHER_KINDS if head.lstrip(b"\t\n\r ").startswith(start))
    raise ArtifactError(f"{path} is no GGUF file: {next(known, 'it begins with other bytes')}.")


def _strings(data: bytes, count: int) -> list[str]:
    found, position, unpack = [], 0, struct.Struct("<Q").unpack_from
    for _ in range(count):
        end = position + 8 + unpack(data, position)[0]
        found.append(data[position + 8 : end].decode("utf-8", errors="replace"))
        position = end
    return found


class _Reader:
    """One pass over a mapped file; `position` never moves past what was checked to be there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = len(MAGIC)
        self.elements_left = _MAX_ELEMENTS
        self.types: dict[str, int] = {}

    def header(self) -> GGUFHeader:
        version = self.unpack("I", "the version")
        if version & 0xFFFF == 0:
            raise self.broken("it was written for big-endian machines; convert the original again")
        if version not in _VERSIONS:
            raise self.broken(f"it is GGUF version {version} and ggtool reads 2 and 3")
        n_tensors = self.count(_MAX_TENSORS, 32, "tensors")
        n_keys = self.count(_MAX_KEYS, 13, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string("a key's name", _MAX_NAME_BYTES)
            if key in metadata:
                raise self.broken(f"it has the key {key!r} twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.broken(f"its alignment {alignment!r} is no power of two")
        listed = [self.tensor() for _ in range(n_tensors)]
        data_offset = -(-self.position // alignment) * alignment
        tensors = self.place(listed, data_offset, alignment)
        return GGUFHeader(
            path=self.path,
            version=version,
            alignment=alignment,
            metadata=MappingProxyType(metadata),
            tensors=tensors,
            data_offset=data_offset,
            types=MappingProxyType(self.types),
        )

    def value(self, key: str) -> Any:
        kind = self.types[key] = self.unpack("I", f"the type of {key!r}")
        if kind == _STRING:
            return self.string(f"the value of {key!r}", _MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.broken(f"the value of {key!r} has the unknown type {kind}")
        return self.unpack(_SCALARS[kind], f"the value of {key!r}")

    def array(self, key: str) -> ArrayRef:
        kind, length = self.unpack("I", f"the type of {key!r}"), self.unpack("Q", f"the length of {key!r}")
        if kind != _STRING and kind not in _SCALARS:
            raise self.broken(f"{key!r} is an array of arrays or of an unknown type")
        start = self.position
        if kind == _STRING:
            if length > min((self.size - start) // 8, self.elements_left):
                raise self.broken(f"{key!r} claims {length} strings")
            self.elements_left -= length
            self.skip_strings(length, key)
        else:
            self.skip(length * struct.calcsize(_SCALARS[kind]), f"the array {key!r}")
        return ArrayRef(kind, length, start, self.position - start)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor's name", _MAX_NAME_BYTES)
        n_dims = self.unpack("I", f"the dimensions of {name!r}")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.broken(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.unpack("Q", f"the shape of {name!r}") for _ in range(n_dims))[::-1]
        kind, offset = self.unpack("I", f"the type of {name!r}"), self.unpack("Q", f"the offset of {name!r}")
        if kind not in TENSOR_TYPES:
            raise self.broken(f"tensor {name!r} has the unknown type {kind}")
        _, block, _ = TENSOR_TYPES[kind]
        if min(shape) < 1 or math.prod(shape) >= 1 << 63 or shape[-1] % block:
            raise self.broken(f"tensor {name!r} has the impossible shape {shape}")
        return name, shape, kind, offset

    def place(
        self, listed: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        """Turn relative offsets into absolute ones once they are known to be aligned, in the file and apart."""
        tensors, end, seen = [], 0, set[str]()
        for name, shape, kind, offset in listed:
            type_name, block, block_bytes = TENSOR_TYPES[kind]
            n_bytes = math.prod(shape) // block * block_bytes
            if name in seen:
                raise self.broken(f"it has the tensor {name!r} twice")
            if offset % alignment or offset < end:
                raise self.broken(
                    f"tensor {name!r} begins at {offset}, unaligned or inside the one before it"
                )
            end = offset + n_bytes
            if start + end > self.size:
                raise self.broken(
                    f"it is cut short: {name!r} ends at byte {start + end} of {self.size}; get it again"
                )
            seen.add(name)
            tensors.append(TensorInfo(name, shape, type_name, start + offset, n_bytes))
        return tuple(tensors)

    def unpack(self, code: str, what: str) -> Any:
        start = self.position
        self.skip(struct.calcsize(code), what)
        if code == "?" and self.data[start] > 1:
            raise self.broken(f"{what} is no true or false")
        return struct.unpack_from("<" + code, self.data, start)[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        count = int(self.unpack("Q", f"the number of {what}"))
        if count > min(most, (self.size - self.position) // least_bytes):
            raise self.broken(
                f"it claims {count} {what} and has {self.size} bytes; it is cut short or damaged, get it again"
            )
        return count

    def string(self, what: str, most: int) -> str:
        n_bytes = self.unpack("Q", what)
        if n_bytes > most:
            raise self.broken(f"{what} claims {n_bytes} bytes")
        start = self.position
        self.skip(n_bytes, what)
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def skip_strings(self, count: int, key: str) -> None:
        # The one hot loop: 100,000 tokens and merges in some 20 ms, so no calls but the one to unpack.
        unpack, data, position, last = (
            struct.Struct("<Q").unpack_from,
            self.data,
            self.position,
            self.size - 8,
        )
        for _ in range(count):
            if position > last:
                raise self.broken(f"it ends inside {key!r}; get it again")
            position += 8 + unpack(data, position)[0]
        if position > self.size:
            raise self.broken(f"it ends inside {key!r}; get it again")
        self.position = position

    def skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.position:
            raise self.broken(f"it ends inside {what}; get it again")
        self.position += n_bytes

    def broken(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be used: {what}.")
