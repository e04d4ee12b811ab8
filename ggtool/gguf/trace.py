"""What each byte of a GGUF header is, in order: the strict reader's own pass, written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ggtool.gguf.byte_source import ByteSource
from ggtool.gguf.header import MAGIC, ArrayRef, GGUFHeader
from ggtool.gguf.problems import MalformedError
from ggtool.gguf.reader import Reader
from ggtool.gguf.tensor_types import STRING, TENSOR_TYPES, VALUE_TYPE_NAMES

T = TypeVar("T")

# Of a text.
_TRACED_CHARS = 72


class Region(NamedTuple):
    """Bytes of a header that belong together: first byte, end, what they are, and what they say."""

    start: int
    end: int
    what: str
    value: str


def trace_source(
    source: ByteSource, path: Path
) -> tuple[GGUFHeader | None, list[Region], MalformedError | None]:
    """Read a header and say what each of its bytes is, in order, up to where it cannot be read further.

    The header is None, and the error is given, where it cannot be read to its end.
    """
    reader = _Tracer(source, path)
    try:
        return reader.header(keep_arrays=False), reader.regions, None
    except MalformedError as error:
        return None, reader.regions, error


class _Tracer(Reader):
    """Notes every step of the pass."""

    def __init__(self, source: ByteSource, path: Path) -> None:
        super().__init__(source, path)
        self.regions: list[Region] = []

    def start(self) -> int:
        version = super().start()
        self.regions.insert(0, Region(0, len(MAGIC), "the magic number", repr(MAGIC.decode())))
        return version

    def skip(self, n_bytes: int, what: str) -> int:
        start = super().skip(n_bytes, what)
        if n_bytes:
            self.regions.append(Region(start, self.position, what, ""))
        return start

    def u32(self, what: str) -> int:
        value = super().u32(what)
        if what.startswith("the tensor type"):
            name = TENSOR_TYPES[value][0] if value in TENSOR_TYPES else ""
        else:
            name = VALUE_TYPE_NAMES.get(value, "") if " type of " in what else ""
        return self._says(value, f"{value} ({name})" if name else str(value))

    def u64(self, what: str) -> int:
        value = super().u64(what)
        return self._says(value, str(value))

    def string(self, what: str, most: int) -> str:
        text = super().string(what, most)
        if text:
            self._says(text, repr(text[:_TRACED_CHARS]) + ("…" if len(text) > _TRACED_CHARS else ""))
        return text

    def scalar(self, kind: int, key: str) -> Any:
        value = super().scalar(kind, key)
        return self._says(value, f"{value:.9g}" if isinstance(value, float) else str(value))

    def array(self, key: str) -> ArrayRef:
        ref = super().array(key)
        if ref.type == STRING and ref.n_bytes:
            self.regions.append(Region(ref.offset, self.position, f"the array {key!r}", ""))
        if ref.n_bytes:
            self._says(ref, f"{ref.length} x {VALUE_TYPE_NAMES[ref.type]}")
        return ref

    def _says(self, value: T, said: str) -> T:
        self.regions[-1] = self.regions[-1]._replace(value=said)
        return value
