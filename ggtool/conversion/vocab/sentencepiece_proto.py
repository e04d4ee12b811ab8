"""The few facts of a SentencePiece model file (`tokenizer.model`) that a GGUF holds, without the library.

The file is one Protocol Buffers message, ModelProto of sentencepiece_model.proto: pieces with score and type, and
two groups of settings. Only the wire format is known here; every length is checked against what is there.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces by id, in columns, and the settings.

    Attributes:
        texts: the pieces, where ▁ is a space.
        scores: the higher, the sooner a piece is made.
        types: by SentencePiece's numbers.
        model_type: by SentencePiece's number.
        dummy_prefix: whether a text gets a space in front.
        normalization: the name of the rules that a text is rewritten by, "" if it stays as it is.
        removes_blanks: whether blanks at both ends of a text, and all but one of several, are removed.

    """

    texts: list[str]
    scores: array[float]
    types: bytearray
    model_type: int
    dummy_prefix: bool
    normalization: str
    removes_blanks: bool


def read_model_file(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model; SourceError when it is damaged or something else."""
    texts: list[str] = []
    scores, types = array("f"), bytearray()
    model_type, dummy_prefix, removes_blanks, name, has_rules = 1, True, True, "", False
    try:
        for field, value in _fields(path.read_bytes()):
            if not isinstance(value, bytes):
                continue
            if field == 1:
                text, score, kind = _piece(value)
                texts.append(text)
                scores.append(score)
                types.append(kind)
            elif field == 2:
                model_type = _setting(value, 3, model_type)
            elif field == 3:
                dummy_prefix = bool(_setting(value, 3, int(dummy_prefix)))
                removes_blanks = bool(_setting(value, 4, int(removes_blanks)))
                for number, part in _fields(value):
                    if number == 1 and isinstance(part, bytes):
                        name = part.decode("utf-8")
                    elif number == 2:
                        has_rules = bool(part)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, IndexError, struct.error):
        raise SourceError(f"{path} is no SentencePiece model, or it is damaged; get it again.") from None
    if not texts:
        raise SourceError(f"{path} is no SentencePiece model, or it is damaged; get it again.")
    rules = (name or "rules of its own") if has_rules else ""
    return SentencePieceModel(texts, scores, types, model_type, dummy_prefix, rules, removes_blanks)


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


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
