"""A GGUF file made of parts of others: pairs and tensor entries byte for byte, tensor data copied and never read.

pairs = raw_pairs(header)              the bytes of each key-value pair, in order
layout = lay_out(pairs, tensors)       the header of the new file, and where each tensor goes
write_file(path, layout)               the file
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import ArtifactError
from ggtool.gguf.header import DEFAULT_ALIGNMENT, MAGIC, GGUFHeader, TensorInfo
from ggtool.system.copying import copy_range

_VERSION = 3
_COUNTS = struct.Struct("<IQQ")
_OFFSET = struct.Struct("<Q")


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it is in a file: which file, its TensorInfo, and its entry without the offset at the end."""

    file: Path
    info: TensorInfo
    entry: bytes


@dataclass(frozen=True)
class RawLayout:
    """A file to be: its header, padded to the first tensor, and each tensor with its place behind the header."""

    header: bytes
    tensors: tuple[tuple[RawTensor, int], ...]
    n_bytes: int


def raw_pairs(header: GGUFHeader) -> dict[str, bytes]:
    """Return key -> the bytes of its pair, in the file's order; ArtifactError for version 1, whose pairs differ."""
    _check_version(header)
    with header.path.open("rb") as file:
        data = file.read(max((span.end for span in header.spans.values()), default=0))
    return {key: data[span.start : span.end] for key, span in header.spans.items()}


def raw_tensors(header: GGUFHeader) -> list[RawTensor]:
    """Return the tensors of one file, in its order."""
    _check_version(header)
    with header.path.open("rb") as file:
        data = file.read(header.data_offset)
    return [
        RawTensor(header.path, tensor, data[tensor.entry[0] : tensor.entry[1] - _OFFSET.size])
        for tensor in header.tensors
    ]


def lay_out(
    pairs: Mapping[str, bytes], tensors: Sequence[RawTensor], alignment: int = DEFAULT_ALIGNMENT
) -> RawLayout:
    """Place tensors one after another behind a header of these pairs."""
    entries, placed, offset = [], [], 0
    for tensor in tensors:
        entries.append(tensor.entry + _OFFSET.pack(offset))
        placed.append((tensor, offset))
        offset = padded(offset + tensor.info.n_bytes, alignment)
    header = encode(pairs.values(), len(pairs), entries, alignment)
    return RawLayout(header, tuple((tensor, len(header) + at) for tensor, at in placed), len(header) + offset)


def encode(pairs: Iterable[bytes], n_pairs: int, entries: Sequence[bytes], alignment: int) -> bytes:
    """Return a header's bytes up to the first tensor's data."""
    start = MAGIC + _COUNTS.pack(_VERSION, len(entries), n_pairs)
    header = b"".join([start, *pairs, *entries])
    return header.ljust(padded(len(header), alignment), b"\0")


def padded(n_bytes: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def write_file(path: Path, layout: RawLayout, report: Callable[[int], None] | None = None) -> None:
    """Write a file over `path`, which exists; report(bytes of this piece) follows each piece of tensor data."""
    with ExitStack() as stack:
        target = os.open(path, os.O_WRONLY)
        stack.callback(os.close, target)
        sources: dict[Path, int] = {}
        os.ftruncate(target, layout.n_bytes)  # what no tensor covers is padding and reads as zeros
        done = 0
        while done < len(layout.header):
            done += os.pwrite(target, layout.header[done:], done)
        for tensor, offset in layout.tensors:
            if tensor.file not in sources:
                sources[tensor.file] = os.open(tensor.file, os.O_RDONLY)
                stack.callback(os.close, sources[tensor.file])
            copy_range(sources[tensor.file], tensor.info.offset, target, offset, tensor.info.n_bytes, report)


def _check_version(header: GGUFHeader) -> None:
    if header.version < 2:
        raise ArtifactError(f"{header.path} is GGUF version 1; convert the original again.")
