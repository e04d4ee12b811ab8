"""What lies in the cache, and how it goes: an entry is a file or a folder under one kind, `cache/KIND/ENTRY`.

An entry is renamed before it is removed, so that nobody finds half of one; what an interrupted removal leaves is removed by
the next. What scripts/env builds is left alone while one of the scripts holds the cache's lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import OutputError
from ggtool.system.atomic import PARTIAL_SUFFIX

# Kinds whose entries are named by a checkpoint's content, and what the kinds are.
_OF_MODELS = ("gguf", "packed", "calibration")
KINDS = {
    "gguf": "GGUF files made for evaluations",
    "packed": "packed models that a calibration text decided",
    "calibration": "importance matrices and divergences",
    "floats": "float GGUF files on their way through llama.cpp's converter",
    "tokens": "texts as token ids, for training",
    "copies": "files that another machine handed to this node of a Ray cluster",
    "kernels": "packed products, compiled for this CPU",
    "selftest": "results of llama.cpp's self-test",
    "wheels": "llama.cpp, compiled for this CPU: about ten minutes to make again",
    "llama-tools": "llama.cpp's own tools, compiled for this CPU",
    "archives": "llama.cpp's source",
    "logs": "logs of builds",
    "stage": "scratch space of builds",
}
_OF_SCRIPTS = ("wheels", "llama-tools", "archives", "logs", "stage")
_LOCK = ".lock"
_REMOVED = ".removed-"


@dataclass(frozen=True)
class CacheEntry:
    """One file or folder of the cache.

    holds: the names of what lies in a folder. models: names of files made of the same checkpoint, wherever in the cache.
    used_s: when a file of it was last read or written, seconds since 1970; file systems may tell reads a day late.
    """

    kind: str
    path: Path
    holds: tuple[str, ...]
    models: tuple[str, ...]
    size_bytes: int
    used_s: float

    @property
    def content(self) -> str:
        """The first 16 digits of the sha256 of the checkpoint that it was made of; "" for what is of no model."""
        return self.path.name.partition("-")[0] if self.kind in _OF_MODELS else ""


def list_entries(cache: Path) -> list[CacheEntry]:
    """Return what is in the cache, by kind and name; nothing where there is no cache. OutputError if it cannot be read."""
    try:
        folders = sorted(path for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else []
        found = [
            _entry(folder.name, path)
            for folder in folders
            if not folder.name.startswith(".")
            for path in sorted(folder.iterdir())
        ]
    except OSError as error:
        raise OutputError(f"cannot read the cache {cache}: {error.strerror}.") from error
    names: dict[str, set[str]] = {}
    for entry in found:
        if entry.content:
            names.setdefault(entry.content, set()).update(entry.models)
    return [_with_models(entry, names.get(entry.content, ())) for entry in found]


def remove_entries(cache: Path, entries: Sequence[CacheEntry]) -> None:
    """Remove entries; OutputError names the first that cannot be, or says that a build is using the cache."""
    try:
        with _lock(cache, needed=any(entry.kind in _OF_SCRIPTS for entry in entries)):
            for entry in entries:
                _refuse_busy(entry)
            for left in cache.glob(f"{_REMOVED}*"):
                shutil.rmtree(left)
            for entry in entries:
                with tempfile.TemporaryDirectory(prefix=_REMOVED, dir=cache) as folder:
                    entry.path.rename(Path(folder) / entry.path.name)
            for kind in {entry.path.parent for entry in entries}:
                if not any(kind.iterdir()):
                    kind.rmdir()
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename or cache}: {error.strerror}.") from error


def _refuse_busy(entry: CacheEntry) -> None:
    """Raise OutputError where someone is writing: the lock of a temporary file tells (`ggtool.system.atomic`)."""
    for partial in (entry.path, *entry.path.rglob("*")):
        if partial.name.endswith(PARTIAL_SUFFIX) and partial.exists():
            handle = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{entry.path} is being written; wait for that to end.") from None
            finally:
                os.close(handle)


def _entry(kind: str, path: Path) -> CacheEntry:
    files = [Path(place) / name for place, _, names in os.walk(path) for name in names]
    files = files if path.is_dir() else [path]
    facts = [file.lstat() for file in files]
    holds = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    models = tuple(name for name in holds if not name.startswith(".")) if kind in ("gguf", "packed") else ()
    used = max((max(one.st_atime, one.st_mtime) for one in facts), default=path.stat().st_mtime)
    return CacheEntry(kind, path, tuple(holds), models, sum(one.st_size for one in facts), used)


def _with_models(entry: CacheEntry, names: Sequence[str] | set[str]) -> CacheEntry:
    return CacheEntry(
        entry.kind, entry.path, entry.holds, tuple(sorted(names)), entry.size_bytes, entry.used_s
    )


@contextmanager
def _lock(cache: Path, *, needed: bool) -> Iterator[None]:
    """Hold the lock that the scripts hold while they build."""
    if not needed:
        yield
        return
    with (cache / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"a build is using {cache}; wait for it to end, or remove other kinds."
            ) from None
        yield
