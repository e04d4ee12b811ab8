"""The cache: files that ggtool can make again, under keys that cover everything that made them."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import OutputError

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (".py", ".cpp", ".cu", ".h", ".json")


def cache_folder() -> Path:
    """Return $GGTOOL_CACHE, or ggtool's folder in the user's cache; OutputError where there is no home to look in."""
    try:
        if chosen := os.environ.get("GGTOOL_CACHE"):
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "ggtool"
    except RuntimeError:
        raise OutputError(
            "this user has no home folder to keep a cache in; set GGTOOL_CACHE to a folder that can be written."
        ) from None


@dataclass(frozen=True)
class Makers:
    """The code behind a cached file: files and folders of ggtool, and libraries by their release."""

    sources: tuple[str, ...]
    packages: tuple[str, ...]

    def sha256(self, *more: str) -> str:
        """Return the sha256 of the code, the releases and `more`."""
        from importlib.metadata import (
            version,  # takes 15 ms to import, which most commands need not spend
        )

        releases = [f"{package} {version(package)}" for package in self.packages]
        return hashlib.sha256(
            "\0".join([*releases, sources_sha256(*self.sources), *more]).encode()
        ).hexdigest()


def keyed_folder(kind: str, content_sha256: str, makers: Makers, *more: str) -> Path:
    """Return the folder for files that `makers` make from a checkpoint; a different key is a different folder.

    more: anything else that decides the content, such as the hash of an external program.
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
