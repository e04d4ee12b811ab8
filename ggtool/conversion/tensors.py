"""Map a checkpoint's tensors to GGUF tensors: names, shapes and views are checked, no data is read.

The order is the checkpoint's (shards, then names), as upstream's converter writes it; tensors computed from the config
come first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.conversion.architectures import Architecture, Weight, evaluate
from ggtool.errors import SourceError
from ggtool.source.quantized.tensor import ComputedTensor
from ggtool.source.safetensors import FLOAT_TYPES, LazyTensor, widen

_COMPARE_ROWS = 256
_BAND_BYTES = 1 << 21
_KEPT_BYTES = 1 << 24


@dataclass(frozen=True)
class ModelTensor:
    """A tensor to be written. `view` is a view of the mapped checkpoint; all axes but the last index its rows.

    `plus` is added to every element, in float32.
    """

    name: str
    source: LazyTensor
    view: npt.NDArray[Any]
    shape: tuple[int, ...]
    plus: float = 0.0

    @property
    def n_rows(self) -> int:
        """The number of rows, 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.shape[-1]

    @property
    def kept(self) -> bool:
        """Whether it is small enough to keep mapped until all its rows are read."""
        return self.source.raw.nbytes <= _KEPT_BYTES

    def release(self, begin: int, end: int) -> None:
        """Release the mapped pages of rows begin to end, and of what lies between them in the file."""
        self.source.release(self.view[begin:end] if self.view.ndim == 2 else None)

    def rows(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Read rows begin to end as float32 (end - begin, n_per_row), C-contiguous; it may be the mapped file itself."""
        found = self._stored_rows(begin, end)
        if self.plus:
            found = found + np.float32(self.plus)
        return found

    def _stored_rows(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        if isinstance(self.source, ComputedTensor):
            return self.source.rows(self.view[..., 0].reshape(-1)[begin:end])
        if self.view.ndim == 1:
            piece = self.view[None]
        elif self.view.ndim == 2:
            piece = self.view[begin:end]
        else:  # a permutation: pick the rows one by one
            piece = self.view[np.unravel_index(np.arange(begin, end), self.view.shape[:-1])]
        if piece.flags.c_contiguous:
            return widen(piece, self.source.dtype)
        # A column spans the whole stored matrix: read it in bands, so that only one band is in memory.
        found = np.empty((end - begin, self.n_per_row), np.float32)
        step = max(1, _BAND_BYTES // abs(piece.strides[-1] or 1))
        for at in range(0, self.n_per_row, step):
            # Copy in file order first: columns may lie a page apart, which is slow to gather.
            band = np.ascontiguousarray(piece[:, at : at + step].T)
            found[:, at : at + step] = widen(band, self.source.dtype).T
            if not self.kept:
                self.source.release()
        return found


def model_tensors(
    row: Architecture,
    hparams: Mapping[str, Any],
    config: Mapping[str, Any],
    weights: Mapping[str, LazyTensor],
) -> list[ModelTensor]:
    """Match a checkpoint's tensors with the architecture's.

    Raises SourceError for a tensor that is missing, unexpected, of another shape or not a float type.
    """
    expected = dict(expected_tensors(row, hparams, len(weights)))
    dropped = {name.format(block) for name in row.drop for block in range(hparams["n_layer"])}
    present = _named(row, {*expected, *dropped}, weights)
    for name, weight in expected.items():
        if weight.repeats and hparams["tied"] and weight.repeats not in present and name in present:
            present[weight.repeats] = present.pop(name)  # tied, and stored under the head's name
    if missing := [
        name
        for name, weight in expected.items()
        if name not in present and not _may_be_absent(weight, hparams)
    ]:
        where = _holder(weights.values())
        raise SourceError(
            f"{where} lacks {len(missing)} tensors of {len(expected)}, the first is {missing[0]}."
        )
    if extra := [name for name in present if name not in expected and name not in dropped]:
        where = _holder(present[name] for name in extra)
        raise SourceError(
            f"{where} has {len(extra)} tensors that a {row.gguf_name} model does not have, the first is {present[extra[0]].name}."
        )
    found = [_computed(name, values) for name, values in row.computed(hparams, config).items()]
    for name, tensor in present.items():
        if name in dropped:
            continue
        weight = expected[name]
        checked = _check(tensor, weight, hparams)
        if weight.repeats and not weight.written and _same(tensor, present[weight.repeats]):
            continue
        if weight.only_copy:
            raise SourceError(
                f"{tensor.file}: tensor {tensor.name} is not a copy of {weight.repeats}, and llama.cpp's "
                f"{row.gguf_name} has no output head of its own."
            )
        found.append(checked)
    # A tied head that the checkpoint leaves out and llama.cpp's graph requires.
    found += [
        _check(present[weight.repeats], weight, hparams)
        for name, weight in expected.items()
        if weight.written and name not in present
    ]
    return found


def _named(
    row: Architecture, known: Collection[str], weights: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the text model's tensors under the row's names; a checkpoint of the base model lacks the prefix."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        if name.startswith(row.drop_under):
            continue
        plain = _stripped(name, row)
        if plain not in known and row.base_prefix + plain in known:
            plain = row.base_prefix + plain
        if plain in found:
            raise SourceError(
                f"{tensor.file.parent} has the tensors {found[plain].name} and {name}, which are one."
            )
        found[plain] = tensor
    return found


def _holder(tensors: Iterable[LazyTensor]) -> Path:
    files = sorted({tensor.file for tensor in tensors})
    return files[0] if len(files) == 1 else files[0].parent


def _may_be_absent(weight: Weight, hparams: Mapping[str, Any]) -> bool:
    return bool(weight.repeats) and bool(hparams["tied"])


def _stripped(name: str, row: Architecture) -> str:
    for piece in row.strip:
        name = name.replace(piece, "", 1)
    return name


def _computed(name: str, values: npt.NDArray[np.float32]) -> ModelTensor:
    source = LazyTensor(name, "F32", values.shape, Path("config.json"), values, None, 0)
    return ModelTensor(name, source, values, values.shape)


def expected_tensors(
    row: Architecture, hparams: Mapping[str, Any], n_tensors: int
) -> Iterator[tuple[str, Weight]]:
    """Yield each tensor of a model of `row`: its name in the checkpoint, and what becomes of it.

    Raises SourceError for more blocks than `n_tensors`, the number of tensors there are, could hold.
    """
    n_layer = hparams["n_layer"]
    if n_layer > n_tensors:
        raise SourceError(
            f"config.json has {n_layer} blocks, and the checkpoint holds only {n_tensors} tensors."
        )
    for name, weight in row.tensors.items():
        if weight.when and not hparams[weight.when]:
            continue
        if "{}" not in name:
            yield name, weight
            continue
        for block in range(n_layer):
            yield name.format(block), replace(weight, name=weight.name.format(block))


def _check(tensor: LazyTensor, weight: Weight, hparams: Mapping[str, Any]) -> ModelTensor:
    if tensor.dtype not in FLOAT_TYPES:
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name} has the type {tensor.dtype}, which is not a float."
        )
    shape = tuple(evaluate(part, hparams) for part in weight.shape.split())
    view = _view(tensor, weight, hparams) if tensor.raw.ndim == len(shape) else None
    # A view may split the axes before the last; the rows must still be as many and as long.
    if view is None or view.shape[-1] != shape[-1] or view.size != math.prod(shape):
        raise SourceError(
            f"{tensor.file}: tensor {tensor.name} has the shape {tensor.shape}, and config.json makes "
            f"{weight.name} {shape}."
        )
    if isinstance(tensor, ComputedTensor) and view.strides[-1]:
        raise SourceError(
            f"{tensor.file}: {tensor.name} is packed the other way round than {weight.name} needs it."
        )
    return ModelTensor(weight.name, tensor, view, shape, weight.plus)


def _view(tensor: LazyTensor, weight: Weight, hparams: Mapping[str, Any]) -> npt.NDArray[Any] | None:
    try:
        return weight.view(tensor.raw, hparams)
    except ValueError:  # no whole number of heads
        return None


def _same(tensor: LazyTensor, other: LazyTensor) -> bool:
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, tensor.shape[0], _COMPARE_ROWS)
    same = all(_piece_bytes(tensor, at) == _piece_bytes(other, at) for at in starts)
    tensor.release()
    other.release()
    return same


def _piece_bytes(tensor: LazyTensor, first: int) -> bytes:
    """Return some rows as bytes, to be compared with those of a tensor of the same type."""
    if not isinstance(tensor, ComputedTensor):
        return tensor.raw[first : first + _COMPARE_ROWS].tobytes()
    return tensor.rows(np.arange(first, min(first + _COMPARE_ROWS, tensor.shape[0]))).tobytes()
