"""The few facts of a SentencePiece model file (`tokenizer.model`) that a GGUF holds, read and written without the library.

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
        raise SourceError(
            f"{path} is not a SentencePiece model, or it is damaged; download it again."
        ) from None
    if not texts:
        raise SourceError(f"{path} is not a SentencePiece model, or it is damaged; download it again.")
    rules = (name or "rules of its own") if has_rules else ""
    return SentencePieceModel(texts, scores, types, model_type, dummy_prefix, rules, removes_blanks)


def encode_model(model: SentencePieceModel, *, unknown: int, bos: int, eos: int) -> bytes:
    """Return the bytes of a tokenizer.model; `unknown`, `bos` and `eos` are ids of pieces, or -1 for none."""
    pieces = [
        _bytes_field(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + _number_field(3, kind)
        for text, score, kind in zip(model.texts, model.scores, model.types, strict=True)
    ]
    trainer = _number_field(3, model.model_type) + _number_field(35, 1)  # byte_fallback
    for field, number in ((40, unknown), (41, bos), (42, eos)):
        trainer += _number_field(field, number & 0xFFFFFFFFFFFFFFFF)
    normalizer = _number_field(3, int(model.dummy_prefix)) + _number_field(4, int(model.removes_blanks))
    parts = [
        *(_bytes_field(1, piece) for piece in pieces),
        _bytes_field(2, trainer),
        _bytes_field(3, normalizer),
    ]
    return b"".join(parts)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(data)) + data


def _number_field(number: int, value: int) -> bytes:
    return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


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
