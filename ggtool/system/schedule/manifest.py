"""Files by content: what the driver has, and a node's copies under `copies/` in its cache.

A copy's folder is named by the sha256 of names and contents, so that one file is brought to a node once, whoever needs it.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import GgtoolError, OutputError
from ggtool.system.atomic import atomic_folder, atomic_output
from ggtool.system.cache import cache_folder
from ggtool.system.files import file_sha256
from ggtool.system.schedule.work import Files

CHUNK_BYTES = 16 << 20

# read(path, offset, n_bytes): of a file on the driver's machine.
Read = Callable[[Path, int, int], bytes]
# make(path): a file that should become what the manifest describes.
Make = Callable[[Path], None]


@dataclass(frozen=True)
class Entry:
    """One file by its content; its name is "" where the manifest is of one file."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A file or some files of a folder: where the driver has them, and what is in them."""

    origin: Path
    entries: tuple[Entry, ...]

    @property
    def sha256(self) -> str:
        """One sha256 over names and contents."""
        listed = (f"{entry.name}\0{entry.sha256}\n" for entry in self.entries)
        return hashlib.sha256(f"{self.origin.name}\n{''.join(listed)}".encode()).hexdigest()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder's."""
        return any(entry.name for entry in self.entries)

    @property
    def copy(self) -> Path:
        """Where the copy lies in this machine's cache, or will lie."""
        return cache_folder() / "copies" / self.sha256[:32] / self.origin.name


def describe(files: Files) -> Manifest:
    """Read files of this machine and return their manifest; OutputError for one that cannot be read."""
    names: Sequence[str] = files.names or ("",)
    try:
        return Manifest(files.path, tuple(_entry(name, files.path / name) for name in names))
    except OSError as error:
        raise OutputError(
            f"cannot read {error.filename}, which other nodes need: {error.strerror}."
        ) from error


def fetch(
    manifest: Manifest, read: Read, progress: Callable[[int, int], None], make: Make | None = None
) -> Path:
    """Return this machine's copy; one that is missing is made by `make`, or brought here by `read`. progress counts bytes.

    Those who need it at once wait for one to bring it. What `make` made counts if it has the content of the driver's file.
    OutputError where the copy has another content than was said, or cannot be written.
    """
    copy = manifest.copy
    with locked(copy.parent / ".lock"):
        if copy.exists() or (make is not None and _made(manifest, make)):
            return copy
        total = sum(entry.n_bytes for entry in manifest.entries)
        done = 0

        def write(entry: Entry, path: Path) -> None:
            nonlocal done
            digest = hashlib.sha256()
            with path.open("wb") as file:
                for start in range(0, entry.n_bytes, CHUNK_BYTES):
                    chunk = read(manifest.origin / entry.name, start, min(CHUNK_BYTES, entry.n_bytes - start))
                    digest.update(chunk)
                    file.write(chunk)
                    done += len(chunk)
                    progress(done, total)
            if digest.hexdigest() != entry.sha256:
                raise OutputError(
                    f"{manifest.origin / entry.name} was changed while it was copied to another node; start again."
                )

        if manifest.is_folder:
            with atomic_folder(copy, force=False, is_ours=lambda _: False) as temporary:
                for entry in manifest.entries:
                    write(entry, temporary / entry.name)
        else:
            with atomic_output(copy) as temporary:
                write(manifest.entries[0], temporary)
    return copy


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made if it is missing; it ends with the process at the latest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error


def _made(manifest: Manifest, make: Make) -> bool:
    """Make the copy here; whether it has become what the driver has. A failure to make it is not one to copy it."""
    copy = manifest.copy
    try:
        make(copy)
    except GgtoolError:
        return False
    if file_sha256(copy) == manifest.entries[0].sha256:
        return True
    copy.unlink()
    return False


def _entry(name: str, path: Path) -> Entry:
    return Entry(name, path.stat().st_size, file_sha256(path))
