"""Pack the header of a GGUF v3 file: key-value pairs in order, then the tensor list, padded to the alignment of data.

Keys, value types and their order come in as gguf-py's own values; they are only packed here, because its
writer packs a vocabulary one Python call per token.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.errors import SourceError
from ggtool.gguf.header import DEFAULT_ALIGNMENT, MAGIC
from ggtool.gguf.tensor_types import TENSOR_TYPES, row_bytes

_VERSION = 3
_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
_CODES = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of a file to be: numpy's shape, ggml's tensor type, offset in the data section, size in bytes."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int

    @property
    def n_params(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


def place(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> tuple[PlacedTensor, ...]:
    """Lay (name, shape, tensor type) out one after another, each aligned."""
    placed, offset = [], 0
    for name, shape, type_name in tensors:
        n_bytes = math.prod(shape[:-1]) * row_bytes(type_name, shape[-1])
        placed.append(PlacedTensor(name, shape, type_name, offset, n_bytes))
        offset = aligned(offset + n_bytes)
    return tuple(placed)


def aligned(n_bytes: int) -> int:
    """Round up to the alignment of tensor data."""
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def pack(values: Mapping[str, GGUFValue]) -> dict[str, bytes]:
    """Return key -> the bytes of the whole pair. Files of one model share most of them, and packing a vocabulary takes longest."""
    return {key: _string(key) + _value(key, value) for key, value in values.items()}


def encode(pairs: Mapping[str, bytes], tensors: Sequence[PlacedTensor]) -> bytes:
    """Return the header's bytes up to the first tensor's data, of packed pairs and tensors in their order."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(pairs)), *pairs.values()]
    for tensor in tensors:
        dims = tensor.shape[::-1]  # GGUF lists the row's length first
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", _NUMBERS[tensor.type_name], tensor.offset))
    header = b"".join(parts)
    return header.ljust(aligned(len(header)), b"\0")


def _string(text: str) -> bytes:
    return _strings([text])


def _strings(texts: Iterable[str]) -> bytes:
    packed, pack_length = bytearray(), struct.Struct("<Q").pack
    try:
        for text in texts:
            data = text.encode("utf-8")
            packed += pack_length(len(data))
            packed += data
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise SourceError(f"the checkpoint's text {error.object[:40]!r} is not valid Unicode.") from None
    return bytes(packed)


def _value(key: str, value: GGUFValue) -> bytes:
    kind = struct.pack("<I", value.type)
    try:
        if value.type == GGUFValueType.ARRAY:
            return kind + _array(value.value, value.sub_type)
        if value.type == GGUFValueType.STRING:
            return kind + _string(value.value)
        return kind + struct.pack("<" + _CODES[value.type], value.value)
    except (struct.error, AttributeError, OverflowError, TypeError, ValueError):
        raise SourceError(
            f"the checkpoint's README.md or JSON files give {key} an impossible value."
        ) from None


def _array(elements: Sequence[Any], element_type: GGUFValueType | None) -> bytes:
    element_type = element_type or GGUFValueType.get_type(elements[0])
    start = struct.pack("<IQ", element_type, len(elements))
    if element_type == GGUFValueType.STRING:
        return start + _strings(elements)
    return start + struct.pack(f"<{len(elements)}{_CODES[element_type]}", *elements)
