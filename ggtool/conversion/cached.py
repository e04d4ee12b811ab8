"""Cache folders for converted GGUF files, keyed by everything that decides their bytes."""

from __future__ import annotations

from pathlib import Path

from ggtool.conversion.architectures import find_architecture
from ggtool.conversion.vendored import converter_sha256
from ggtool.errors import SourceError
from ggtool.source.resolve import ModelSource
from ggtool.system.cache import Makers, keyed_folder
from ggtool.system.files import content_sha256

CONVERTER_SOURCES = ("formats.py", "source", "gguf", "conversion")
_MAKERS = Makers(CONVERTER_SOURCES, ("llama-cpp-python", "gguf", "numpy"))
# Files of a checkpoint that reach a GGUF file and are not covered by `ModelSource.sha256` (weights and vocabulary).
_MORE_FILES = (
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
)


def gguf_folder(source: ModelSource) -> Path:
    """Return the folder for GGUF files made of a checkpoint by this code, this llama.cpp and this converter."""
    return keyed_folder("gguf", source.sha256, _MAKERS, *made_of(source))


def made_of(source: ModelSource) -> tuple[str, str]:
    """Return hashes of what decides a GGUF file beside ggtool and the checkpoint's sha256.

    The first is of the checkpoint's other files, the second of llama.cpp's converter where that is used, else empty.
    """
    files = [source.folder / name for name in _MORE_FILES]
    more = content_sha256([file for file in files if file.is_file()])
    try:
        borrows = find_architecture(source.config) is None
        return more, converter_sha256() if borrows else ""
    except SourceError:
        return more, ""  # not convertible; the conversion itself reports why
