"""Keys that two GGUF files do not share, or that hold other values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGUFValueType

from ggtool.gguf.header import ArrayRef, GGUFHeader

_LONGEST_TEXT = 60


@dataclass(frozen=True)
class KeyDifference:
    """A key with its values in words; None where a file has not got it.

    `detail` says where two lists part: the first index with other elements, and how many there are.
    """

    key: str
    first: str | None
    second: str | None
    detail: str = ""


def compare_keys(first: GGUFHeader, second: GGUFHeader) -> list[KeyDifference]:
    """Return the keys that differ in type or value, in the order of `first`, then those of `second` alone."""
    found = []
    for key in dict.fromkeys([*first.metadata, *second.metadata]):
        a, b = _value(first, key), _value(second, key)
        if (
            a == b
            and first.types.get(key) == second.types.get(key)
            and _kind(first, key) == _kind(second, key)
        ):
            continue
        detail = _part(a, b) if isinstance(a, list) and isinstance(b, list) else ""
        found.append(KeyDifference(key, _text(first, key, a), _text(second, key, b), detail))
    return found


def _value(header: GGUFHeader, key: str) -> Any:
    value = header.metadata.get(key)
    return header.array(key) if isinstance(value, ArrayRef) else value


def _kind(header: GGUFHeader, key: str) -> int | None:
    value = header.metadata.get(key)
    return value.type if isinstance(value, ArrayRef) else None


def _text(header: GGUFHeader, key: str, value: Any) -> str | None:
    if key not in header.metadata:
        return None
    if isinstance(value, list):
        kind = _kind(header, key)
        assert kind is not None
        return f"{len(value):,} x {GGUFValueType(kind).name.lower()}"
    text = value if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    shown = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}… ({len(text):,} characters)"
    return f"{shown} ({GGUFValueType(header.types[key]).name.lower()})"


def _part(a: list[Any], b: list[Any]) -> str:
    differing = [index for index, (one, other) in enumerate(zip(a, b, strict=False)) if one != other]
    if not differing:
        return f"the first {min(len(a), len(b)):,} are the same"
    index = differing[0]
    return f"{len(differing):,} differ, the first at {index}: {_short(a[index])} and {_short(b[index])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"


def key_facts(difference: KeyDifference) -> Mapping[str, str | None]:
    """Return a difference as JSON has it."""
    return {
        "key": difference.key,
        "first": difference.first,
        "second": difference.second,
        "detail": difference.detail or None,
    }
