"""Where ggtool keeps what it can make again, under keys of everything that made it."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (".py", ".cpp", ".h")


def cache_folder() -> Path:
    """Return $GGTOOL_CACHE, or ggtool's folder in the user's cache."""
    if chosen := os.environ.get("GGTOOL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ggtool"


@dataclass(frozen=True)
class Makers:
    """The code that makes what is cached: files and folders of ggtool, and the libraries whose releases count."""

    sources: tuple[str, ...]
    packages: tuple[str, ...]

    def sha256(self, *more: str) -> str:
        """Return the sha256 of the code, the releases, and what else decides the content."""
        from importlib.metadata import (
            version,  # with what it imports, 15 ms that most commands need not spend
        )

        releases = [f"{package} {version(package)}" for package in self.packages]
        return hashlib.sha256(
            "\0".join([*releases, sources_sha256(*self.sources), *more]).encode()
        ).hexdigest()


def keyed_folder(kind: str, content_sha256: str, makers: Makers, *more: str) -> Path:
    """Return the folder for what `makers` make of a checkpoint's content; another key is another folder.

    more: whatever else decides what is made, such as the hash of a program that is not ggtool's.
    """
    return cache_folder() / kind / f"{content_sha256[:16]}-{makers.sha256(*more)[:8]}"


@functools.cache
def sources_sha256(*names: str) -> str:
    """Return the sha256 of the code in some of ggtool's files and folders."""
    digest = hashlib.sha256()
    for name in names:
        place = _PACKAGE / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.suffix in _SOURCES:
                digest.update(f"{file.relative_to(_PACKAGE)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()
