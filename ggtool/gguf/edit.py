"""Change the keys of a GGUF file without touching its tensor data.

Where the new header can end exactly where the old one does, it is written over it: alignment takes up to 31 bytes, and
a shorter header is filled with one string of blanks under FILLER_KEY. Otherwise the file is copied, tensor data in the
kernel, and takes the old one's name when it is whole.

A process that dies while it writes over a header leaves the old header in a `.NAME.header` beside the file; the next
edit of that file puts it back first. A part of a split model is a file like any other.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.errors import OutputError, UsageError
from ggtool.gguf.header import GGUFHeader
from ggtool.gguf.reader import read_header
from ggtool.gguf.rewrite import encode, lay_out, raw_pairs, raw_tensors, write_file
from ggtool.gguf.writer import pack
from ggtool.system.atomic import atomic_output
from ggtool.system.disk import check_space
from ggtool.system.progress import StageProgress

# Unknown keys are skipped by every reader.
FILLER_KEY = "ggtool.padding"
_FILLER_LEAST = len(pack({FILLER_KEY: GGUFValue("", GGUFValueType.STRING)})[FILLER_KEY])
# They say how the file is laid out; another value would make it unreadable.
_FIXED = (Keys.General.ALIGNMENT, Keys.General.ARCHITECTURE)
_FIXED_PREFIX = "split."
# Where the Hub's cache keeps files, under their hashes.
_HUB_FILES = "blobs"


@dataclass(frozen=True)
class Changes:
    """What to change, in this order: keys deleted, keys renamed, pairs set.

    Attributes:
        delete: keys; one that ends in "*" stands for all that begin with what is before it.
        rename: old key -> new key, which keeps its place.
        set: key -> the bytes of its whole pair, as `ggtool.gguf.writer.pack` and `rewrite.raw_pairs` make them; a key
            that is there keeps its place, a new one goes to the end.

    """

    delete: Sequence[str] = ()
    rename: Mapping[str, str] | None = None
    set: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class Edited:
    """The file, whether its header was written in place, the bytes written, the keys that differ from before."""

    path: Path
    in_place: bool
    n_bytes: int
    changed: tuple[str, ...]


def edit(
    path: Path,
    changes: Changes,
    out: Path | None = None,
    *,
    force: bool = False,
    progress: StageProgress | None = None,
) -> Edited:
    """Change the keys of a file, or of a copy named `out`; progress("copying", bytes done, bytes in all).

    Raises UsageError for a key that is not there or that says how the file is laid out, OutputError for a disk without
    room, a file that may not be written, or one that is being edited already.
    """
    path = path.resolve()  # a link stays a link to the file that is changed
    if out is None and path.parent.name == _HUB_FILES:
        raise OutputError(
            f"{path} belongs to the Hub's cache, which knows it by its hash; name a copy with --out."
        )
    recover(path)
    header = read_header(path)
    old = raw_pairs(header)
    new = _apply(path, old, changes)
    changed = tuple(
        key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) and key != FILLER_KEY
    )
    if out is not None and out.resolve() != path:
        return _copy(header, new, out, changed, force=force, progress=progress)
    if not changed:
        return Edited(path, True, 0, ())
    fitted = _fit(header, new)
    if fitted is None:
        return _copy(header, new, path, changed, force=True, progress=progress)
    _overwrite(path, fitted, header, old)
    return Edited(path, True, len(fitted), changed)


def _apply(path: Path, old: Mapping[str, bytes], changes: Changes) -> dict[str, bytes]:
    pairs = {key: pair for key, pair in old.items() if key != FILLER_KEY}
    for pattern in changes.delete:
        wanted = [key for key in pairs if _matches(key, pattern)]
        if not wanted:
            raise UsageError(f"{path} has no key {pattern}.")
        for key in wanted:
            _refuse_fixed(key)
            del pairs[key]
    for key, name in (changes.rename or {}).items():
        _refuse_fixed(key)
        _refuse_fixed(name)
        if key not in pairs:
            raise UsageError(f"{path} has no key {key}.")
        if name in pairs or not name:
            raise UsageError(f"{key} cannot be renamed {name!r}: the file has that key, or it is empty.")
        renamed = _key_bytes(name) + pairs[key][len(_key_bytes(key)) :]
        pairs = {name if one == key else one: renamed if one == key else pair for one, pair in pairs.items()}
    for key, pair in (changes.set or {}).items():
        _refuse_fixed(key)
        pairs[key] = pair
    return pairs


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _refuse_fixed(key: str) -> None:
    if key in _FIXED or key.startswith(_FIXED_PREFIX) or key == FILLER_KEY:
        raise UsageError(f"{key} says how the file is laid out and cannot be changed.")


def _key_bytes(key: str) -> bytes:
    data = key.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _fit(header: GGUFHeader, pairs: Mapping[str, bytes]) -> bytes | None:
    """Return a header that ends where the old one does; None if there is none."""
    entries = [tensor.entry for tensor in raw_tensors(header)]
    offsets = [(tensor.offset - header.data_offset).to_bytes(8, "little") for tensor in header.tensors]
    whole = [entry + offset for entry, offset in zip(entries, offsets, strict=True)]
    plain = encode(pairs.values(), len(pairs), whole, header.alignment)
    if len(plain) == header.data_offset:
        return plain
    bare = len(encode(pairs.values(), len(pairs), whole, 1))
    blanks = header.data_offset - bare - _FILLER_LEAST
    if blanks < 0:
        return None
    filled = {**pairs, **pack({FILLER_KEY: GGUFValue(" " * blanks, GGUFValueType.STRING)})}
    return encode(filled.values(), len(filled), whole, header.alignment)


def _copy(
    header: GGUFHeader,
    pairs: Mapping[str, bytes],
    out: Path,
    changed: tuple[str, ...],
    *,
    force: bool,
    progress: StageProgress | None,
) -> Edited:
    layout = lay_out(pairs, raw_tensors(header), header.alignment)
    check_space({out: layout.n_bytes})
    done = 0

    def report(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress("copying", done, layout.n_bytes)

    with atomic_output(out, force=force) as temporary:
        write_file(temporary, layout, report)
        read_header(temporary)
    return Edited(out, False, layout.n_bytes, changed)


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.header")


def _overwrite(path: Path, fitted: bytes, header: GGUFHeader, old: Mapping[str, bytes]) -> None:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from None
    try:
        _lock(handle, path)
        if raw_pairs(read_header(path)) != old:
            raise OutputError(f"{path} was changed by another process meanwhile; run again.")
        with atomic_output(_journal(path), force=True) as temporary:
            temporary.write_bytes(os.pread(handle, header.data_offset, 0))
        _write(handle, fitted)
        _journal(path).unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        os.close(handle)
    read_header(path)


def recover(path: Path) -> None:
    """Put the old header back where an edit of this file was cut off; nothing to do otherwise."""
    path = path.resolve()
    journal = _journal(path)
    if not journal.exists():
        return
    try:
        handle = os.open(path, os.O_RDWR)
        try:
            _lock(handle, path)
            if journal.exists():  # another process may have put it back while this one waited
                _write(handle, journal.read_bytes())
                journal.unlink()
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot put the old header of {path} back: {error.strerror}.") from error


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path} is being edited by another process; try again when it is done.") from None


def _write(handle: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], done)
    os.fsync(handle)
