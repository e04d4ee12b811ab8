"""A weight that is computed row by row when it is read, and what the schemes that pack weights share.

All of them keep a matrix as small whole numbers with scales (and zero points) for blocks of it. Rows are those of a
Linear, (n_out, n_in). Results are rounded as the packing library itself computes, in the type of its scales, so that
both run the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.errors import SourceError
from ggtool.source.safetensors import LazyTensor, widen

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ComputedTensor(LazyTensor):
    """A matrix of which only the parts are in the file.

    `raw` holds row numbers in the place of weights, the same in a whole row: any view of it that keeps rows whole
    says which rows it wants. `compute` makes rows by their numbers; `parts` are the tensors it reads.
    """

    compute: Callable[[Numbers], Floats] = field(repr=False)
    parts: tuple[LazyTensor, ...] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """The size of its parts in the file."""
        return sum(part.n_bytes for part in self.parts)

    def rows(self, numbers: npt.NDArray[Any]) -> Floats:
        """Compute rows of the Linear, float32 (len(numbers), n_in), C-contiguous."""
        return np.ascontiguousarray(self.compute(np.asarray(numbers, np.int64)), np.float32)

    def float32(self) -> Floats:
        """Compute all of it, in the shape that the checkpoint's float tensor would have."""
        is_turned = bool(self.raw.strides[-1])
        whole = self.rows(np.arange(self.shape[1 if is_turned else 0]))
        return np.ascontiguousarray(whole.T) if is_turned else whole

    def release(self, part: npt.NDArray[Any] | None = None) -> None:  # noqa: ARG002  # its parts know no rows
        """Give the pages of all parts back to the kernel."""
        for one in self.parts:
            one.release()

    def turned(self) -> ComputedTensor:
        """Return the same weight as a checkpoint stores it that has (n_in, n_out)."""
        return replace(self, raw=self.raw.T, shape=self.shape[::-1])


@dataclass(frozen=True)
class Found:
    """What a scheme found in a checkpoint.

    Attributes:
        what: the scheme and its settings in words, such as "GPTQ, 4 bits".
        weights: the packed weights by the name of their float tensor.
        consumed: the tensors that take no other part: packed weights, scales, statistics of activations.
        dropped: what a GGUF has no place for, as the end of a sentence; empty for nothing.

    """

    what: str
    weights: Mapping[str, ComputedTensor]
    consumed: frozenset[str]
    dropped: str = ""


def computed(
    name: str,
    shape: tuple[int, int],
    parts: Mapping[str, LazyTensor],
    compute: Callable[[Numbers], Floats],
) -> ComputedTensor:
    """Return the weight `name` of `shape` (n_out, n_in), made of `parts`."""
    numbers = np.broadcast_to(np.arange(shape[0])[:, None], shape)
    first = next(iter(parts.values()))
    return ComputedTensor(name, "F32", shape, first.file, numbers, None, 0, compute, tuple(parts.values()))


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a weight is of GPT-2's Conv1D, which a float checkpoint stores as (n_in, n_out)."""
    return config.get("model_type") == "gpt2" and ".c_" in name


def take_parts(
    tensors: Mapping[str, LazyTensor],
    prefix: str,
    wanted: Mapping[str, tuple[str, ...]],
    optional: tuple[str, ...] = (),
) -> dict[str, LazyTensor]:
    """Return the parts `prefix + name` of one weight by their short names, each of one of the types wanted.

    Raises SourceError for one that is missing, unless it is `optional`, or that is of another type.
    """
    parts = {}
    for part, dtypes in wanted.items():
        tensor = tensors.get(prefix + part)
        if tensor is None:
            if part in optional:
                continue
            raise SourceError(f"the checkpoint has no {prefix + part}, and the weight is packed with it.")
        if tensor.dtype not in dtypes:
            raise SourceError(
                f"{tensor.file}: {tensor.name} is made of {tensor.dtype}; expected {' or '.join(dtypes)}."
            )
        parts[part] = tensor
    return parts


def check_shape(tensor: LazyTensor, *shapes: tuple[int, ...]) -> None:
    """Raise SourceError unless `tensor` has one of `shapes`."""
    if tensor.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise SourceError(
            f"{tensor.file}: {tensor.name} has the shape {tensor.shape}, and its weight needs {wanted}."
        )


def take(array: npt.NDArray[Any], numbers: Numbers, axis: int = 0) -> npt.NDArray[Any]:
    """Take rows or columns by number: a view where they follow one another, as they mostly do."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and np.all(np.diff(numbers) == 1):
        part = slice(int(numbers[0]), int(numbers[-1]) + 1)
        return array[part] if axis == 0 else array[:, part]
    return np.take(array, numbers, axis)


def unpack(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Read `count` unsigned numbers of `bits` each along the last axis, packed from the lowest bit of each word up.

    A number may lie across two words. Returns uint8 (..., count).
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :count]
    if bits in (2, 4):
        per_byte = 8 // bits
        parts = [data >> (bits * number) & ((1 << bits) - 1) for number in range(per_byte)]
        return np.stack(parts, axis=-1).reshape(*data.shape[:-1], -1)[..., :count]
    each = np.unpackbits(data, axis=-1, bitorder="little")[..., : count * bits]
    each = each.reshape(*data.shape[:-1], count, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]


def rounded(values: Floats, dtype: str) -> Floats:
    """Round float32 to the nearest value of a safetensors float type, ties to even, and return it as float32."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        pattern = values.view(np.uint32)
        pattern = pattern + (0x7FFF + (pattern >> 16 & 1))
        return (pattern & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def block_scales(
    scales: LazyTensor, numbers: Numbers, n_out: int, n_in: int, block: tuple[int, int]
) -> Floats:
    """Return the scale of each weight of some rows, float32 that broadcasts to (len(numbers), n_in).

    `scales` are one for all, one a row, or one for each block of `block` (rows, columns), the last ones cut short.
    """
    if scales.n_params == 1:
        return scales.float32().reshape(1, 1)
    if scales.shape in ((n_out,), (n_out, 1)):
        return widen(take(scales.raw.reshape(-1), numbers), scales.dtype).reshape(-1, 1)
    rows = widen(take(scales.raw, numbers // block[0]), scales.dtype)
    return np.repeat(rows, block[1], axis=1)[:, :n_in]


def check_scales(scales: LazyTensor, n_out: int, n_in: int, block: tuple[int, int]) -> None:
    """Raise SourceError unless `block_scales` can read these scales."""
    grid = (-(-n_out // block[0]), -(-n_in // block[1]))
    if scales.n_params != 1:
        check_shape(scales, (n_out,), (n_out, 1), grid)
