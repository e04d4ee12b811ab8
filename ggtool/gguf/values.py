"""A metadata value from the text of a command line: of the type a key has already, or of the type the text looks like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.errors import UsageError

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


def parse_like(old: GGUFValue, text: str, where: str) -> GGUFValue:
    """Read a value of the type of `old`; a list as JSON. UsageError, which begins with `where`, for anything else."""
    if old.type != GGUFValueType.ARRAY:
        return GGUFValue(_parse(text, old.type, where), old.type)
    kind = old.sub_type if old.sub_type is not None else GGUFValueType.get_type(old.value[0])
    try:
        elements = json.loads(text)
    except (ValueError, RecursionError):
        elements = None
    if not isinstance(elements, list) or any(isinstance(one, (list, dict)) for one in elements):
        raise UsageError(f'{where}: this key is a list, so write one as JSON, such as [1, 2] or ["a", "b"].')
    texts = [one if isinstance(one, str) else json.dumps(one) for one in elements]
    return GGUFValue([_parse(one, kind, where) for one in texts], GGUFValueType.ARRAY, kind)


def parse_new(text: str, where: str) -> GGUFValue:
    """Read the value of a new key: KEY=int:5, float:, bool: and str: name its type, else it is guessed."""
    kind, colon, rest = text.partition(":")
    named = {
        "str": GGUFValueType.STRING,
        "bool": GGUFValueType.BOOL,
        "int": GGUFValueType.UINT32,
        "float": GGUFValueType.FLOAT32,
    }
    if colon and kind in named:
        type_ = GGUFValueType.INT32 if kind == "int" and rest.startswith("-") else named[kind]
        return GGUFValue(_parse(rest, type_, where), type_)
    for guess in _GUESSES:
        with suppress(UsageError):
            return GGUFValue(_parse(text, guess, where), guess)
    return GGUFValue(text, GGUFValueType.STRING)


def _parse(text: str, kind: GGUFValueType, where: str) -> Any:
    readers: dict[GGUFValueType, Callable[[str], Any]] = {
        GGUFValueType.STRING: str,
        GGUFValueType.BOOL: lambda word: _TRUTH[word.lower()],
        GGUFValueType.FLOAT32: float,
        GGUFValueType.FLOAT64: float,
    }
    try:
        value = readers.get(kind, int)(text)
    except (KeyError, ValueError):
        raise UsageError(f"{where}: {text!r} is not a {kind.name.lower()}.") from None
    if kind in _INTEGERS:
        signed, bits = _INTEGERS[kind]
        if not -signed << (bits - 1) <= value < 1 << (bits - signed):
            raise UsageError(f"{where}: {text} does not fit {kind.name.lower()}.")
    if isinstance(value, float) and (not math.isfinite(value) or abs(value) > 3.4e38):
        raise UsageError(f"{where}: {text!r} is not a finite number.")
    return value
