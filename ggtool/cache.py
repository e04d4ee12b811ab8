"""Where ggtool keeps what it can make again: GGUF files that an evaluation converted for itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $GGTOOL_CACHE, or ggtool's folder in the user's cache."""
    if chosen := os.environ.get("GGTOOL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ggtool"


def gguf_cache(source_sha256: str) -> Path:
    """Return the folder for files made from a checkpoint's content by this code and this llama.cpp."""
    return cache_folder() / "gguf" / f"{source_sha256[:16]}-{_makers_sha256()[:8]}"


def _makers_sha256() -> str:
    from importlib.metadata import version  # with what it imports, 15 ms that most commands need not spend

    digest = hashlib.sha256(version("llama-cpp-python").encode())
    for file in sorted((Path(__file__).parent / "convert").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
