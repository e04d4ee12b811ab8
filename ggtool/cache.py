"""Where ggtool keeps what it can make again: GGUF files and packed models that an evaluation made for itself."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

_SOURCES = (".py", ".cpp", ".h")


def cache_folder() -> Path:
    """Return $GGTOOL_CACHE, or ggtool's folder in the user's cache."""
    if chosen := os.environ.get("GGTOOL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ggtool"


def gguf_cache(source_sha256: str) -> Path:
    """Return the folder for files made from a checkpoint's content by this code and this llama.cpp."""
    makers = _makers_sha256(("llama-cpp-python",), ("convert",))
    return cache_folder() / "gguf" / f"{source_sha256[:16]}-{makers[:8]}"


def packed_cache(source_sha256: str) -> Path:
    """Return the folder for packed models made from a checkpoint's content by this code and these libraries."""
    makers = _makers_sha256(("torch", "transformers"), ("kernels", "quantizers"))
    return cache_folder() / "packed" / f"{source_sha256[:16]}-{makers[:8]}"


@functools.cache
def sources_sha256(*folders: str) -> str:
    """Return the sha256 of the code in some of ggtool's folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((Path(__file__).parent / folder).rglob("*")):
            if file.suffix in _SOURCES:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _makers_sha256(packages: tuple[str, ...], folders: tuple[str, ...]) -> str:
    from importlib.metadata import version  # with what it imports, 15 ms that most commands need not spend

    releases = [f"{package} {version(package)}" for package in packages]
    return hashlib.sha256(" ".join([*releases, sources_sha256(*folders)]).encode()).hexdigest()
