"""The few facts of a SentencePiece model file (`tokenizer.model`) that a GGUF holds, without the library.

The file is one Protocol Buffers message, ModelProto of sentencepiece_model.proto: pieces with score and type, and
two groups of settings. Only the wire format is known here; every length is checked against what is there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """A token: its text, where ▁ is a space, its score, and its type by SentencePiece's number."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by id; `model_type` by SentencePiece's number; whether a text gets a space in front."""

    pieces: tuple[Piece, ...]
    model_type: int
    dummy_prefix: bool


def read_model_file(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; SourceError when it is damaged or something else."""
    pieces, model_type, dummy_prefix = [], 1, True
    try:
        for field, value in _fields(path.read_bytes()):
            if not isinstance(value, bytes):
                continue
            if field == 1:
                pieces.append(_piece(value))
            elif field == 2:
                model_type = _setting(value, 3, model_type)
            elif field == 3:
                dummy_prefix = bool(_setting(value, 3, int(dummy_prefix)))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, IndexError, struct.error):
        raise SourceError(f"{path} is no SentencePiece model, or it is damaged; get it again.") from None
    if not pieces:
        raise SourceError(f"{path} is no SentencePiece model, or it is damaged; get it again.")
    return SentencePieceModel(tuple(pieces), model_type, dummy_prefix)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _setting(data: bytes, wanted: int, default: int) -> int:
    return next(
        (value for field, value in _fields(data) if field == wanted and isinstance(value, int)), default
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one message: an int for a varint, else the bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("a wire type that no current file has")
        if position + size > len(data):
            raise ValueError("a field that ends beyond its message")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number without an end")
