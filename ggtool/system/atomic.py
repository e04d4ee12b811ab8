"""Atomic outputs: write under a temporary name, flush to disk, rename.

A reader sees the old file or the whole new one, never a part. A killed writer leaves `.NAME.*.partial` behind; the next
writer of the same name finds it unlocked and removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ggtool.errors import OutputError

PARTIAL_SUFFIX = ".partial"


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise OutputError if `path` exists and `force` is not set. Call it before any work is done."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file with --out.")
    if not force and (path.exists() or path.is_symlink()):
        raise OutputError(f"{path} exists; pass --force to replace it, or another name with --out.")


@contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit make it `path`, otherwise remove it.

    Without `force` the name must still be free when the work is done: of two writers one wins and the
    other gets OutputError. The lock on the temporary file is what tells a live writer from a dead one.
    """
    refuse_existing(path, force=force)
    with _temporary(path) as (handle, temporary):
        yield temporary
        os.fsync(handle)
        _publish(temporary, path, force=force)


@contextmanager
def scratch_file(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty file that is deleted after the block; existing memory maps of it stay valid.

    A file that a killed process left behind is removed by the next call for the same name.
    """
    with _temporary(folder / name) as (_, temporary):
        yield temporary


@contextmanager
def atomic_folder(path: Path, *, force: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `path`, for files; on a clean exit flush them and make it `path`, otherwise remove it.

    `force` replaces an empty folder or one that `is_ours` accepts, never another. A replacement takes two renames;
    a process killed between them leaves both folders whole under temporary names.
    """
    refuse_existing_folder(path, force=force, is_ours=is_ours)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write in {path.parent}: {error.strerror}.") from error
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())
            _flush(file)
        os.fsync(handle)
        refuse_existing_folder(path, force=force, is_ours=is_ours)
        _publish_folder(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def refuse_unwritable(path: Path, *, is_folder: bool = False) -> None:
    """Raise OutputError if `path` could not be written. Creates nothing; call it before work whose result would be lost."""
    if not is_folder:
        refuse_existing(path, force=True)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.exists() and not path.is_dir():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error


def refuse_existing_folder(path: Path, *, force: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if `path` exists and may not be replaced. Call it before any work is done."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path} is a file; name a folder with --out.")
    if any(path.iterdir()):
        if not is_ours(path):
            raise OutputError(
                f"{path} was not made by ggtool, so it is not replaced; name another folder with --out."
            )
        if not force:
            raise OutputError(f"{path} exists; pass --force to replace it, or another name with --out.")


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write in {path.parent}: {error.strerror}.") from error
    temporary = Path(name)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.fchmod(handle, 0o666 & ~_umask())
        yield handle, temporary
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def atomic_symlink(link: Path, target: Path) -> None:
    """Point `link` at `target` (in the same folder), replacing an older link but never a real file."""
    if link.exists() and not link.is_symlink():
        raise OutputError(
            f"{link} is a real file, so it is not replaced by a link; remove it to have it point at {target.name}."
        )
    with tempfile.TemporaryDirectory(prefix=f".{link.name}.", dir=link.parent) as folder:
        fresh = Path(folder) / link.name
        fresh.symlink_to(target.name)  # dangling until it is moved up
        fresh.replace(link)


def _publish(temporary: Path, path: Path, *, force: bool) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)  # unlike rename, refuses to replace
        except FileExistsError:
            raise OutputError(
                f"{path} was created by another process in the meantime; pass --force to replace it."
            ) from None
    _flush(path.parent)


def _publish_folder(temporary: Path, path: Path) -> None:
    if path.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent))
        path.rename(aside)
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_orphans(path: Path) -> None:
    for orphan in path.parent.glob(f".{path.name}.*{PARTIAL_SUFFIX}"):
        with suppress(OSError):
            handle = os.open(orphan, os.O_RDONLY)
            try:
                # Raises BlockingIOError while a live writer holds the lock, so its file stays.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if orphan.is_dir():
                    shutil.rmtree(orphan, ignore_errors=True)
                else:
                    orphan.unlink()
            finally:
                os.close(handle)


def _umask() -> int:
    # mkstemp files are readable by their owner only; a model file gets the mode of any new file.
    mask = os.umask(0)
    os.umask(mask)
    return mask
