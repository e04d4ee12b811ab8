"""Write all output files in one pass over the checkpoint.

The work is divided into pieces, some rows of one tensor each. A piece is read and widened once, quantized once per
tensor type in use, and written at its place in each file, since all offsets are known beforehand. Pieces are
independent, so any number of threads can process them, with one piece per thread in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.conversion.ggml import quantize_rows, valid
from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import ArtifactError, OutputError, SourceError
from ggtool.formats import Format
from ggtool.gguf.model import FLOAT_TENSOR_TYPES
from ggtool.gguf.reader import read_header
from ggtool.gguf.tensor_types import row_bytes
from ggtool.gguf.writer import PlacedTensor, aligned

# 2 MiB of float32: large enough to make Python's overhead negligible, small enough for the CPU cache.
_PIECE_WEIGHTS = 1 << 19

_TOO_LARGE = 1e9  # beyond any block scale, which is a float16
_LARGEST_HALF = 65504.0

FileProgress = Callable[[int, int, str], None]
# Tensor -> importance of each weight of a row, float32 (n_matrices, n_per_row).
Importance = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class FileLayout:
    """Exact layout of an output file: its header and the place of each tensor's data."""

    format: Format
    header: bytes
    tensors: tuple[PlacedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """The size of the whole file, the padding behind the last tensor included."""
        if not self.tensors:
            return len(self.header)
        last = self.tensors[-1]
        return len(self.header) + aligned(last.offset + last.n_bytes)


@dataclass(frozen=True)
class _Place:
    descriptor: int
    path: Path
    offset: int


@dataclass(frozen=True)
class _Piece:
    tensor: ModelTensor
    begin: int
    end: int
    importance: npt.NDArray[np.float32] | None
    left: Iterator[int]  # shared by the tensor's pieces; the last to finish draws 0

    @property
    def n_bytes(self) -> int:
        return (self.end - self.begin) * self.tensor.n_per_row * self.tensor.source.raw.itemsize


def write_files(
    tensors: Sequence[ModelTensor],
    outputs: Sequence[tuple[Path, FileLayout]],
    threads: int,
    progress: FileProgress | None,
    importance: Importance,
    rounded: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Fill the files at `outputs` (they exist and are empty); progress(done, total, tensor) counts bytes read.

    rounded: tensors whose data is made already, see `ggtool.conversion.options.Options`.

    Raises SourceError for a weight that is not finite or outside a tensor type's range, OutputError if the disk is
    full; the remaining pieces are cancelled.
    """
    with ExitStack() as stack:
        places: dict[str, dict[str, list[_Place]]] = {tensor.name: {} for tensor in tensors}
        for path, layout in outputs:
            descriptor = os.open(path, os.O_WRONLY)
            stack.callback(os.close, descriptor)
            _write_at(_Place(descriptor, path, 0), memoryview(layout.header))
            # Gaps between tensors are padding and read as zeros, also after the last tensor.
            if layout.tensors:
                _write_at(_Place(descriptor, path, layout.n_bytes - 1), memoryview(b"\0"))
            for placed in layout.tensors:
                place = _Place(descriptor, path, len(layout.header) + placed.offset)
                places[placed.name].setdefault(placed.type_name, []).append(place)
        for name, data in rounded.items():
            for type_name, targets in places[name].items():
                _write_rounded(name, type_name, data, targets)
        pieces = [
            piece
            for tensor in tensors
            if tensor.name not in rounded
            for piece in _pieces(tensor, importance.get(tensor.name))
        ]
        _run(pieces, places, threads, progress)


def verify(path: Path, layout: FileLayout) -> None:
    """Read a written file's header back; ArtifactError unless it lists exactly the tensors laid out."""
    header = read_header(path)
    found = [(t.name, t.shape, t.type_name, t.offset - header.data_offset, t.n_bytes) for t in header.tensors]
    wanted = [(t.name, t.shape, t.type_name, t.offset, t.n_bytes) for t in layout.tensors]
    if found != wanted or header.data_offset != len(layout.header) or path.stat().st_size != layout.n_bytes:
        raise ArtifactError(f"{path} was not written as planned; check the disk and convert again.")


def _run(
    pieces: Sequence[_Piece],
    places: Mapping[str, Mapping[str, list[_Place]]],
    threads: int,
    progress: FileProgress | None,
) -> None:
    total, done = sum(piece.n_bytes for piece in pieces), 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    try:
        waiting: dict[Future[None], _Piece] = {
            pool.submit(_convert, piece, places[piece.tensor.name]): piece for piece in pieces
        }
        while waiting:
            finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
                piece = waiting.pop(future)
                done += piece.n_bytes
                if progress:
                    progress(done, total, piece.tensor.name)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_rounded(name: str, type_name: str, data: npt.NDArray[Any], targets: Sequence[_Place]) -> None:
    made = data if data.dtype == np.uint8 else quantize_rows(type_name, data.reshape(1, -1))
    assert valid(type_name, made), f"{name} was rounded to something that is no {type_name}"
    for place in targets:
        _write_at(place, made.data)


def _pieces(tensor: ModelTensor, importance: npt.NDArray[np.float32] | None) -> Iterator[_Piece]:
    step = max(1, _PIECE_WEIGHTS // tensor.n_per_row)
    # Each matrix of a stack has its own importance, so a piece must not span two.
    n_matrices = 1 if importance is None else len(importance)
    rows = tensor.n_rows // n_matrices
    left = count(n_matrices * -(-rows // step) - 1, -1)
    for matrix in range(n_matrices):
        own = None if importance is None else importance[matrix]
        for begin in range(matrix * rows, (matrix + 1) * rows, step):
            yield _Piece(tensor, begin, min(begin + step, (matrix + 1) * rows), own, left)


def _convert(piece: _Piece, places: Mapping[str, list[_Place]]) -> None:
    tensor = piece.tensor
    rows = tensor.rows(piece.begin, piece.end)
    # A NaN or an infinity shows in min and max, which is several times faster than isfinite on every weight.
    extreme = max(-float(rows.min()), float(rows.max()))
    if not np.isfinite(extreme):
        raise SourceError(f"{tensor.source.file}: tensor {tensor.source.name} holds a NaN or an infinity.")
    for type_name, targets in places.items():
        # ggml's grid search aborts the process if a square overflows.
        fits = extreme < _TOO_LARGE or not type_name.startswith("IQ")
        data = quantize_rows(type_name, rows, piece.importance) if fits else np.empty(0, np.uint8)
        # A float type can only overflow; where it cannot, there is nothing to check.
        sure = type_name == "F32" or (type_name in FLOAT_TENSOR_TYPES and extreme <= _LARGEST_HALF)
        if not fits or not (sure or valid(type_name, data)):
            raise SourceError(
                f"{tensor.source.file}: tensor {tensor.source.name} has weights too large for {type_name}."
            )
        start = piece.begin * row_bytes(type_name, tensor.n_per_row)
        for place in targets:
            _write_at(_Place(place.descriptor, place.path, place.offset + start), data.data)
    if not tensor.kept:
        tensor.release(piece.begin, piece.end)
    elif not next(piece.left):
        tensor.source.release()


def _write_at(place: _Place, data: memoryview) -> None:
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(place.descriptor, data[done:], place.offset + done)
    except OSError as error:
        raise OutputError(f"cannot write in {place.path.parent}: {error.strerror}.") from error
