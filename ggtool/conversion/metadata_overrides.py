"""Metadata set on the command line: --name and --metadata KEY=VALUE.

A value takes the type that the key has already. A new key takes the type that its value looks like, or the one
written before it as llama-quantize's --override-kv has it: KEY=int:5, KEY=float:5, KEY=bool:true, KEY=str:5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.errors import UsageError

# Keys that describe the file's layout; another value would make it unreadable.
_FIXED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_FIXED_PREFIXES = ("split.", "quantize.imatrix.")
_TRUTH = {"true": True, "false": False}

_GUESSES = (
    GGUFValueType.BOOL,
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.INT64,
    GGUFValueType.FLOAT32,
)
_INTEGERS = {
    GGUFValueType.UINT8: (0, 8),
    GGUFValueType.INT8: (1, 8),
    GGUFValueType.UINT16: (0, 16),
    GGUFValueType.INT16: (1, 16),
    GGUFValueType.UINT32: (0, 32),
    GGUFValueType.INT32: (1, 32),
    GGUFValueType.UINT64: (0, 64),
    GGUFValueType.INT64: (1, 64),
}


def split_pair(text: str, flag: str) -> tuple[str, str]:
    """Split KEY=VALUE at the first "="; UsageError if there is none or the key is empty."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"{flag} {text!r} is not of the form KEY=VALUE.")
    return key, value


def override(
    values: Mapping[str, GGUFValue], name: str | None, metadata: Mapping[str, str]
) -> dict[str, GGUFValue]:
    """Return `values` with the model's name and the keys in `metadata` replaced in place or added at the end.

    Raises UsageError for a key that may not be changed, or a value that is not of its key's type.
    """
    changed = dict(values)
    if name is not None:
        changed[Keys.General.NAME] = GGUFValue(name, GGUFValueType.STRING)
    for key, text in metadata.items():
        if key in _FIXED or key.startswith(_FIXED_PREFIXES):
            raise UsageError(f"--metadata {key}: this key describes the file's layout and cannot be set.")
        changed[key] = _like(key, text, values[key]) if key in values else _guess(key, text)
    return changed


def _like(key: str, text: str, old: GGUFValue) -> GGUFValue:
    if old.type == GGUFValueType.ARRAY:
        raise UsageError(f"--metadata {key}: this key is a list, which cannot be written on a command line.")
    return GGUFValue(_parse(key, text, old.type), old.type)


def _guess(key: str, text: str) -> GGUFValue:
    kind, colon, rest = text.partition(":")
    named = {
        "str": GGUFValueType.STRING,
        "bool": GGUFValueType.BOOL,
        "int": GGUFValueType.UINT32,
        "float": GGUFValueType.FLOAT32,
    }
    if colon and kind in named:
        if kind == "int" and rest.startswith("-"):
            return GGUFValue(_parse(key, rest, GGUFValueType.INT32), GGUFValueType.INT32)
        return GGUFValue(_parse(key, rest, named[kind]), named[kind])
    for guess in _GUESSES:
        with suppress(UsageError):
            return GGUFValue(_parse(key, text, guess), guess)
    return GGUFValue(text, GGUFValueType.STRING)


def _parse(key: str, text: str, kind: GGUFValueType) -> Any:
    readers: dict[GGUFValueType, Callable[[str], Any]] = {
        GGUFValueType.STRING: str,
        GGUFValueType.BOOL: lambda word: _TRUTH[word.lower()],
        GGUFValueType.FLOAT32: float,
        GGUFValueType.FLOAT64: float,
    }
    try:
        value = readers.get(kind, int)(text)
    except (KeyError, ValueError):
        raise UsageError(f"--metadata {key}: {text!r} is not a {kind.name.lower()}.") from None
    if kind in _INTEGERS:
        signed, bits = _INTEGERS[kind]
        if not -signed << (bits - 1) <= value < 1 << (bits - signed):
            raise UsageError(f"--metadata {key}: {text} does not fit {kind.name.lower()}.")
    if isinstance(value, float) and (not math.isfinite(value) or abs(value) > 3.4e38):
        raise UsageError(f"--metadata {key}: {text!r} is not a finite number.")
    return value
