"""Metadata set on the command line: --name and --metadata KEY=VALUE.

A value takes the type that the key has already. A new key takes the type that its value looks like, or the one
written before it as llama-quantize's --override-kv has it: KEY=int:5, KEY=float:5, KEY=bool:true, KEY=str:5.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.errors import UsageError
from ggtool.gguf.values import parse_like, parse_new

# Keys that describe the file's layout; another value would make it unreadable.
_FIXED = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
_FIXED_PREFIXES = ("split.", "quantize.imatrix.")


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
        where = f"--metadata {key}"
        changed[key] = parse_like(values[key], text, where) if key in values else parse_new(text, where)
    return changed
