"""The bytes of a GGUF file with their meaning, from the magic number down to a block of weights taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggtool.conversion.ggml import dequantize_rows
from ggtool.errors import UsageError
from ggtool.gguf.blocks import Block, fields, take_apart
from ggtool.gguf.byte_source import open_file
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from ggtool.gguf.trace import Region, trace_source
from ggtool.inspection.opened import WITHOUT_FLOATS, Opened, Part

# Of a long region only so many bytes are shown at its start.
SHOWN_BYTES = 64


@dataclass(frozen=True)
class Row:
    """Bytes of a file: where, the first of them, how many there are, what they are, and what they say."""

    offset: int
    data: bytes
    n_bytes: int
    what: str
    value: str


@dataclass(frozen=True)
class BlockView:
    """A block of a tensor: where it is, its bytes field by field, its parts, and its weights as ggml reads them."""

    tensor: TensorInfo
    index: int
    offset: int
    rows: tuple[Row, ...]
    block: Block
    weights: tuple[float, ...]


def walk_header(path: Path) -> list[Row]:
    """Return a row for every number, text and array of a header, padding and the tensors' data after it.

    Of a file that cannot be read to the end of its header the last row says why.
    """
    with open_file(path) as source:
        header, regions, error = trace_source(source, path)
        rows = [_row(source.data, region) for region in regions]
        end = regions[-1].end if regions else 0
        if error is not None:
            rest = bytes(source.data[end : end + SHOWN_BYTES])
            said = str(error).removeprefix(f"{path} ")
            return [*rows, Row(end, rest, source.size - end, "not read", said)]
        assert header is not None
        places = [(end, header.data_offset, "padding up to the alignment")]
        at = header.data_offset
        for tensor in header.tensors:
            if tensor.offset > at:
                places.append((at, tensor.offset, "padding"))
            shape = " x ".join(map(str, tensor.shape))
            places.append(
                (
                    tensor.offset,
                    tensor.offset + tensor.n_bytes,
                    f"the data of {tensor.name!r}: {shape} {tensor.type_name}",
                )
            )
            at = tensor.offset + tensor.n_bytes
        places.append((at, source.size, "padding at the end"))
        for start, stop, what in places:
            if start < stop:
                rows.append(
                    Row(start, bytes(source.data[start : min(stop, start + 16)]), stop - start, what, "")
                )
        return rows


def view_block(model: Opened, where: str) -> BlockView:
    """Take a block apart. `where` is TENSOR or TENSOR:BLOCK, a block's number from 0; UsageError for another one."""
    name, _, number = where.partition(":")
    found = [(tensor, part) for tensor, part in model.tensors if tensor.name == name]
    if not found:
        raise UsageError(f"{model.name} has no tensor {name}; `ggtool inspect FILE` lists them.")
    tensor, part = found[0]
    block = TENSOR_TYPES[TYPE_NUMBERS[tensor.type_name]][1]
    n_blocks = tensor.n_params // block
    index = int(number) if number.isdecimal() and len(number) < 20 else 0 if not number else -1
    if not 0 <= index < n_blocks:
        raise UsageError(f"{name} has blocks 0 to {n_blocks - 1}, and {number!r} is none of them.")
    return read_block(part, tensor, index)


def read_block(part: Part, tensor: TensorInfo, index: int) -> BlockView:
    """Read block `index` of a tensor and take it apart."""
    assert part.path is not None
    name, n_weights, n_bytes = TENSOR_TYPES[TYPE_NUMBERS[tensor.type_name]]
    offset = tensor.offset + index * n_bytes
    with part.path.open("rb") as file:
        file.seek(offset)
        data = file.read(n_bytes)
    if len(data) != n_bytes:
        raise UsageError(f"{part.path} ends before block {index} of {tensor.name}.")
    taken = take_apart(name, data)
    rows = []
    for field in fields(name):
        own = data[field.offset : field.offset + field.n_bytes]
        numbers = taken.fields[field.name]
        shown = f"{numbers[0]:.9g}" if len(numbers) == 1 else ""
        rows.append(Row(offset + field.offset, own, len(own), f"{field.name}: {field.meaning}", shown))
    weights: tuple[float, ...] = ()
    if (
        name not in WITHOUT_FLOATS
        and not (name.startswith("I") and not name.startswith("IQ"))
        and name != "F64"
    ):
        array = np.frombuffer(bytearray(data), np.uint8)
        weights = tuple(dequantize_rows(name, array, n_weights)[0].tolist())
    return BlockView(tensor, index, offset, tuple(rows), taken, weights)


def dump(data: bytes, width: int = 16) -> Iterator[str]:
    """Yield lines of hexadecimal bytes."""
    for start in range(0, len(data), width):
        yield data[start : start + width].hex(" ")


def _row(data: Any, region: Region) -> Row:
    n_bytes = region.end - region.start
    own = bytes(data[region.start : region.start + min(n_bytes, SHOWN_BYTES)])
    return Row(region.start, own, n_bytes, region.what, region.value)
