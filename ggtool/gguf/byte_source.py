"""Where the bytes of a GGUF file come from: a file that is mapped, bytes in memory, or a server that sends ranges.

The header reader sees one thing: `data`, of which the bytes up to `stop` are there after `need(stop)`, and `size`, the
length of the whole file. `ggtool.gguf.remote` has the third kind.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ggtool.errors import ArtifactError

_AHEAD_BYTES = 1 << 18


class ByteSource(Protocol):
    """Random access to the first bytes of a file."""

    # bytes, bytearray or mmap: what can be sliced and read by struct and numpy
    data: Any
    size: int

    def need(self, stop: int) -> None:
        """Make data[:stop] available; ArtifactError or HubError if it cannot be had."""


class Memory:
    """Bytes that are all there."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data, self.size = data, len(data)

    def need(self, stop: int) -> None:
        """Nothing to do."""


class Mapped:
    """A mapped file of which the kernel reads what is needed and little more: tensor data stays on the disk."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self._asked = data, len(data), 0
        data.madvise(mmap.MADV_RANDOM)  # no reading ahead of its own

    def need(self, stop: int) -> None:
        """Ask the kernel for the bytes, at least _AHEAD_BYTES at a time."""
        if stop > self._asked:
            end = min(self.size, max(stop, self._asked + _AHEAD_BYTES))
            self.data.madvise(mmap.MADV_WILLNEED, self._asked, end - self._asked)
            self._asked = end // mmap.PAGESIZE * mmap.PAGESIZE if end < self.size else end


@contextmanager
def open_file(path: Path) -> Iterator[Memory | Mapped]:
    """Map a file for as long as the block runs; ArtifactError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                yield Memory(b"")
                return
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}.") from None
    with data:
        yield Mapped(data)
