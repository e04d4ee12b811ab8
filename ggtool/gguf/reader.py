"""Read the header of a GGUF file in bounded time and memory.

    read_header(path)           a GGUFHeader, or MalformedError for the first thing that is wrong
    examine_header(path)        the same, but what is wrong with keys, names and layout is listed in `problems`
    examine_source(source, path) the same of any ByteSource (bytes in memory, a server)

The file is taken for hostile: every count is checked against the bytes that remain before anything is read, and each
way of being broken has a code in `ggtool.gguf.problems`.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ggtool.gguf import kinds, strings
from ggtool.gguf.byte_source import ByteSource, open_file
from ggtool.gguf.header import DEFAULT_ALIGNMENT, MAGIC, MAX_PARTS, ArrayRef, GGUFHeader, Span, TensorInfo
from ggtool.gguf.problems import MalformedError, Problem
from ggtool.gguf.tensor_types import (
    ARRAY,
    FIRST_TYPE_OF_FORKS,
    REMOVED_TYPES,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    UINT32,
)

# Well above any real model (262,144 tokens, 600,000 merges, 3,000 tensors); they bound the time a hostile header takes.
_MAX_KEYS, _MAX_TENSORS = 1 << 16, 1 << 17
_MAX_STRINGS, _MAX_ALL_STRINGS, _MAX_NUMBERS = 1 << 20, 1 << 21, 1 << 22
_MAX_NAME_BYTES, _MAX_STRING_BYTES = 65_535, 1 << 24
_MAX_DIMS, _MAX_ALIGNMENT = 4, 1 << 20
# What llama.cpp holds of a tensor's name, with a NUL (GGML_MAX_NAME).
_MAX_TENSOR_NAME_BYTES = 64

_SIZES = {kind: struct.calcsize("<" + code) for kind, (_, code) in SCALARS.items()}
_STRUCTS = {kind: struct.Struct("<" + code) for kind, (_, code) in SCALARS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file; MalformedError names the first thing that is wrong with it."""
    header = examine_header(path)
    for problem in header.problems:
        raise _malformed(path, problem)
    return header


def examine_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file as far as it can be understood; what is wrong is listed in `problems`.

    Raises MalformedError where it cannot be read to its end (codes of `problems.FATAL`).
    """
    with open_file(path) as source:
        return examine_source(source, path)


def examine_source(source: ByteSource, path: Path, *, keep_arrays: bool = False) -> GGUFHeader:
    """Read a header from any source; `path` names it in messages. With `keep_arrays` arrays are copied out of it."""
    return Reader(source, path).header(keep_arrays=keep_arrays)


def _malformed(path: Path, problem: Problem) -> MalformedError:
    return MalformedError(f"{path} cannot be used: {problem.message}.", problem.code)


class Reader:
    """One pass over the bytes; `position` never moves past what was checked to be there.

    Each method reads what it is named after and raises MalformedError where the bytes do not hold it.
    """

    def __init__(self, source: ByteSource, path: Path) -> None:
        """Stand at the first byte of `source`; `path` names it in messages."""
        self.path, self.source, self.data, self.size = path, source, source.data, source.size
        self.position = 0
        self.strings_left = _MAX_ALL_STRINGS
        self.problems: list[Problem] = []
        self.types: dict[str, int] = {}
        self.spans: dict[str, Span] = {}
        self.metadata: dict[str, Any] = {}
        self.width = 8  # bytes of a length or a count; 4 in version 1

    def header(self, *, keep_arrays: bool) -> GGUFHeader:
        """Read it all; with `keep_arrays` arrays are copied out of the source."""
        version = self.start()
        n_tensors, n_keys = self.length("the number of tensors"), self.length("the number of keys")
        # A tensor's entry takes at least 32 bytes (24 in version 1), a key-value pair 13 (9).
        self.check_count(n_tensors, _MAX_TENSORS, 2 * self.width + 16, "tensors")
        self.check_count(n_keys, _MAX_KEYS, self.width + 5, "keys")
        for _ in range(n_keys):
            self.pair()
        count = self.metadata.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= MAX_PARTS:
            self.note("split-count", f"split.count is {count!r} and not a number of parts up to {MAX_PARTS}")
        alignment = self.alignment()
        listed = [self.tensor() for _ in range(n_tensors)]
        data_offset = -(-self.position // alignment) * alignment
        tensors = self.place(listed, data_offset, alignment)
        kept = None
        if keep_arrays:
            refs = {key: value for key, value in self.metadata.items() if isinstance(value, ArrayRef)}
            kept = {key: bytes(self.data[ref.offset : ref.offset + ref.n_bytes]) for key, ref in refs.items()}
        return GGUFHeader(
            path=self.path,
            version=version,
            alignment=alignment,
            metadata=MappingProxyType(self.metadata),
            tensors=tensors,
            data_offset=data_offset,
            types=MappingProxyType(self.types),
            spans=MappingProxyType(self.spans),
            size=self.size,
            problems=tuple(self.problems),
            kept=kept,
        )

    def start(self) -> int:
        """Read magic and version; return the version."""
        head_bytes = min(kinds.HEAD_BYTES, self.size)
        self.source.need(head_bytes)
        head = bytes(self.data[:head_bytes])
        if not head.startswith(MAGIC):
            reason = kinds.describe(head, self.size)
            raise MalformedError(f"{self.path} is not a GGUF file: {reason}.", "not-gguf")
        self.position = len(MAGIC)
        version = self.u32("the version")
        if version and version & 0xFFFF == 0:
            raise self.broken(
                "endianness",
                "it was written for big-endian machines; convert the original again, or turn it with gguf-py's "
                "gguf-convert-endian",
            )
        if version not in (1, 2, 3):
            raise self.broken("version", f"it is GGUF version {version} and ggtool reads 1 to 3")
        if version == 1:
            self.width = 4
            self.note(
                "version-1",
                "it is GGUF version 1, which llama.cpp no longer reads; convert the original again",
            )
        return version

    def pair(self) -> None:
        """Read one key-value pair into `metadata`, `types` and `spans`."""
        start = self.position
        key = self.string("a key's name", _MAX_NAME_BYTES)
        kind, value_start = self.u32(f"the value type of {key!r}"), self.position
        if kind == STRING:
            value: Any = self.string(f"the value of {key!r}", _MAX_STRING_BYTES)
        elif kind == ARRAY:
            value = self.array(key)
        elif kind in SCALARS:
            value = self.scalar(kind, key)
        else:
            raise self.broken("value-type", f"the value of {key!r} has the undefined type {kind}")
        if not key:
            self.note("empty-key", "it has a key without a name")
        if key in self.metadata:
            self.note("duplicate-key", f"it has the key {key!r} twice")
            return
        self.metadata[key], self.types[key] = value, kind
        self.spans[key] = Span(start, value_start, self.position)

    def scalar(self, kind: int, key: str) -> Any:
        """Read one value of a type that GGUF numbers `kind`."""
        start = self.skip(_SIZES[kind], f"the value of {key!r}")
        if SCALARS[kind][1] == "?" and self.data[start] > 1:
            self.note("bool-value", f"{key!r} is {self.data[start]}, which is neither true (1) nor false (0)")
        return _STRUCTS[kind].unpack_from(self.data, start)[0]

    def array(self, key: str) -> ArrayRef:
        """Pass over one array; return where it is."""
        kind, length = self.u32(f"the element type of {key!r}"), self.length(f"the length of {key!r}")
        if kind == ARRAY:
            raise self.broken("nested-array", f"{key!r} is an array of arrays, which llama.cpp does not read")
        if kind != STRING and kind not in SCALARS:
            raise self.broken("value-type", f"the elements of {key!r} have the undefined type {kind}")
        start = self.position
        least = self.width if kind == STRING else _SIZES[kind]
        claim = f"{key!r} claims {length} {'strings' if kind == STRING else 'numbers'}"
        if length > (_MAX_STRINGS if kind == STRING else _MAX_NUMBERS):
            raise self.broken("array-length", f"{claim}, more than any real model has")
        if length * least > self.size - start:
            raise self.broken("array-length", f"{claim} and {self.size - start} bytes remain; get it again")
        if kind != STRING:
            self.skip(length * least, f"the array {key!r}")
            return ArrayRef(kind, length, start, self.position - start)
        self.strings_left -= length
        if self.strings_left < 0:
            raise self.broken(
                "array-length", f"{key!r} and the arrays before it claim more than {_MAX_ALL_STRINGS} strings"
            )
        left, self.position = strings.skip(self.data, start, self.size, length, self.width, self.source.need)
        if left:
            raise self.broken(
                "truncated-header",
                f"it ends inside {key!r}, string {length - left} of {length}; get it again",
            )
        return ArrayRef(kind, length, start, self.position - start)

    def alignment(self) -> int:
        """Return general.alignment, or the default where it is none that may be."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_number = type(alignment) is int and 0 < alignment <= _MAX_ALIGNMENT
        if is_number and not alignment & (alignment - 1):
            if self.types.get("general.alignment", UINT32) != UINT32:
                self.note("alignment", "general.alignment is not a UINT32, as llama.cpp wants it")
            return int(alignment)
        self.note(
            "alignment", f"its alignment {alignment!r} is not a power of two of at most {_MAX_ALIGNMENT}"
        )
        return DEFAULT_ALIGNMENT

    def tensor(self) -> tuple[str, tuple[int, ...], int, int, tuple[int, int]]:
        """Read one entry: name, shape as numpy has it, type, offset within the data, span of the entry."""
        start = self.position
        name = self.string("a tensor's name", _MAX_NAME_BYTES)
        if self.position - start - self.width >= _MAX_TENSOR_NAME_BYTES:
            self.note("tensor-name", f"the name of tensor {name!r} is longer than llama.cpp's 63 bytes")
        n_dims = self.u32(f"the dimensions of {name!r}")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.broken(
                "dimensions", f"tensor {name!r} has {n_dims} dimensions; 1 to {_MAX_DIMS} are possible"
            )
        shape = tuple(self.length(f"the shape of {name!r}") for _ in range(n_dims))[::-1]
        kind, offset = self.u32(f"the tensor type of {name!r}"), self.u64(f"the offset of {name!r}")
        if kind not in TENSOR_TYPES:
            raise self.broken("tensor-type", f"tensor {name!r} has the undefined type {kind}{_origin(kind)}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        n_params = math.prod(shape)
        if min(shape) < 1 or n_params // block * block_bytes >= 1 << 63 or n_params >= 1 << 63:
            raise self.broken("shape", f"tensor {name!r} has the impossible shape {shape}")
        if shape[-1] % block:
            raise self.broken(
                "shape",
                f"tensor {name!r} has the impossible shape {shape}: its rows are not whole {type_name} blocks of {block}",
            )
        return name, shape, kind, offset, (start, self.position)

    def place(
        self,
        listed: list[tuple[str, tuple[int, ...], int, int, tuple[int, int]]],
        start: int,
        alignment: int,
    ) -> tuple[TensorInfo, ...]:
        """Turn relative offsets into absolute ones; note what is unaligned, on or apart from the one before, or cut off."""
        tensors, end, seen, is_cut = [], 0, set[str](), False
        for name, shape, kind, offset, entry in listed:
            type_name, block, block_bytes = TENSOR_TYPES[kind]
            n_bytes = math.prod(shape) // block * block_bytes
            if name in seen:
                self.note("duplicate-tensor", f"it has the tensor {name!r} twice")
            expected = -(-end // alignment) * alignment
            if offset % alignment:
                self.note(
                    "unaligned-tensor",
                    f"tensor {name!r} begins at {offset} of the data, unaligned ({alignment} bytes)",
                )
            elif offset < expected:
                self.note(
                    "overlap",
                    f"tensor {name!r} begins at {offset} of the data, inside the one before it, which ends at {end}",
                )
            elif offset > expected:
                self.note(
                    "gap",
                    f"tensor {name!r} begins at {offset} of the data and not at {expected}: a gap of "
                    f"{offset - expected} bytes, which llama.cpp refuses",
                )
            end = offset + n_bytes
            if start + end > self.size and not is_cut:
                is_cut = True  # once: of a file that is cut short, all that follow are cut off too
                self.note(
                    "truncated-data",
                    f"it is cut short: {name!r} ends at byte {start + end} of {self.size}; get it again",
                )
            seen.add(name)
            tensors.append(TensorInfo(name, shape, type_name, start + offset, n_bytes, entry))
        return tuple(tensors)

    def check_count(self, count: int, most: int, least_bytes: int, what: str) -> None:
        """Refuse a count that exceeds `most`, or what the remaining bytes can hold at `least_bytes` each."""
        if count > min(most, (self.size - self.position) // least_bytes):
            raise self.broken(
                f"too-many-{what}",
                f"it claims {count} {what} and has {self.size} bytes; it is cut short or damaged, get it again",
            )

    def string(self, what: str, most: int) -> str:
        """Read a text of at most `most` bytes."""
        n_bytes = self.length(f"the length of {what}")
        if n_bytes > most:
            raise self.broken("string-length", f"{what} claims {n_bytes} bytes")
        start = self.skip(n_bytes, what)
        return bytes(self.data[start : self.position]).decode("utf-8", errors="replace")

    def length(self, what: str) -> int:
        """Read a length or a count, in the version's width."""
        return self.u32(what) if self.width == 4 else self.u64(what)

    def u32(self, what: str) -> int:
        """Read 4 bytes as an unsigned number."""
        start = self.skip(4, what)
        return int(_U32.unpack_from(self.data, start)[0])

    def u64(self, what: str) -> int:
        """Read 8 bytes as an unsigned number."""
        start = self.skip(8, what)
        return int(_U64.unpack_from(self.data, start)[0])

    def skip(self, n_bytes: int, what: str) -> int:
        """Move on by `n_bytes` that are there; return where they begin."""
        start = self.position
        if n_bytes > self.size - start:
            raise self.broken("truncated-header", f"it ends inside {what}; get it again")
        self.position = start + n_bytes
        self.source.need(self.position)
        return start

    def note(self, code: str, message: str) -> None:
        """Add to what is wrong without keeping the rest from being read."""
        self.problems.append(Problem(code, message))

    def broken(self, code: str, message: str) -> MalformedError:
        """Return the error for what cannot be read further."""
        return _malformed(self.path, Problem(code, message))


def _origin(kind: int) -> str:
    if kind in REMOVED_TYPES:
        return f" ({REMOVED_TYPES[kind]}, which ggml has removed; quantize the original again)"
    if kind >= FIRST_TYPE_OF_FORKS and kind < 1 << 16:
        return " (of a fork such as ik_llama.cpp, which llama.cpp cannot load)"
    return ""
