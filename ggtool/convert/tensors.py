"""From a checkpoint's tensors to the GGUF's: names, shapes and views checked, nothing read.

The order is the checkpoint's own (shards, then names), which is the order upstream's converter writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.checkpoint import FLOAT_TYPES, LazyTensor, widen
from ggtool.convert.architectures import Architecture, Weight, product
from ggtool.errors import SourceError

_COMPARE_ROWS = 256
_BAND_BYTES = 1 << 21


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the GGUF to be. `view` looks at the mapped checkpoint; all axes but the last count its rows."""

    name: str
    source: LazyTensor
    view: npt.NDArray[Any]
    shape: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """The number of rows, 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def n_per_row(self) -> int:
        """The number of weights in a row."""
        return self.shape[-1]

    def rows(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Read rows begin to end as float32 (end - begin, n_per_row), C-contiguous."""
        if self.view.ndim == 1:
            piece = self.view[None]
        elif self.view.ndim == 2:
            piece = self.view[begin:end]
        else:  # a permutation: pick the rows one by one
            piece = self.view[np.unravel_index(np.arange(begin, end), self.view.shape[:-1])]
        if piece.flags.c_contiguous:
            return widen(piece, self.source.dtype)
        # A column lies across all of the stored matrix: take it band by band, so that only a band is in memory.
        found = np.empty((end - begin, self.n_per_row), np.float32)
        step = max(1, _BAND_BYTES // abs(piece.strides[-1] or 1))
        for at in range(0, self.n_per_row, step):
            found[:, at : at + step] = widen(piece[:, at : at + step], self.source.dtype)
            self.source.release()
        return found


def model_tensors(
    row: Architecture, hparams: Mapping[str, int | float], weights: Mapping[str, LazyTensor]
) -> list[ModelTensor]:
    """Match the checkpoint with the architecture.

    Raises SourceError for a tensor that is missing, left over, of another shape or not made of floats.
    """
    expected = dict(_expand(row, int(hparams["n_layer"]), len(weights)))
    dropped = {name.format(block) for name in row.drop for block in range(int(hparams["n_layer"]))}
    present = {name.removeprefix(row.strip): tensor for name, tensor in weights.items()}
    if len(present) != len(weights):
        raise SourceError(f"the checkpoint has tensors both with and without the prefix {row.strip!r}.")
    if missing := [name for name, weight in expected.items() if name not in present and not weight.repeats]:
        raise SourceError(
            f"the checkpoint lacks {len(missing)} tensors of {len(expected)}, the first is {missing[0]}."
        )
    if extra := [name for name in present if name not in expected and name not in dropped]:
        raise SourceError(
            f"the checkpoint has {len(extra)} tensors that no {row.gguf_name} has, the first is {present[extra[0]].name}."
        )
    found = []
    for name, tensor in present.items():
        if name in dropped:
            continue
        weight = expected[name]
        checked = _check(tensor, weight, hparams)
        if not weight.repeats or not _same(tensor, present[weight.repeats]):
            found.append(checked)
    return found


def _expand(row: Architecture, n_layer: int, n_tensors: int) -> Iterator[tuple[str, Weight]]:
    if n_layer > n_tensors:
        raise SourceError(
            f"config.json promises {n_layer} blocks and the checkpoint holds {n_tensors} tensors."
        )
    for name, weight in row.tensors.items():
        if "{}" not in name:
            yield name, weight
            continue
        for block in range(n_layer):
            yield (
                name.format(block),
                Weight(weight.name.format(block), weight.shape, weight.view, weight.repeats),
            )


def _check(tensor: LazyTensor, weight: Weight, hparams: Mapping[str, int | float]) -> ModelTensor:
    if tensor.dtype not in FLOAT_TYPES:
        raise SourceError(
            f"{tensor.file.name}: tensor {tensor.name} is made of {tensor.dtype} and not of floats."
        )
    shape = tuple(product(part, hparams) for part in weight.shape.split())
    view = weight.view(tensor.raw, hparams) if tensor.raw.ndim == len(shape) else None
    # A view may split the axes before the last; the rows must still be as many and as long.
    if view is None or view.shape[-1] != shape[-1] or view.size != math.prod(shape):
        raise SourceError(
            f"{tensor.file.name}: tensor {tensor.name} has the shape {tensor.shape}, and config.json makes "
            f"{weight.name} {shape}."
        )
    return ModelTensor(weight.name, tensor, view, shape)


def _same(tensor: LazyTensor, other: LazyTensor) -> bool:
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, tensor.shape[0], _COMPARE_ROWS)
    pairs = ((tensor.raw[at : at + _COMPARE_ROWS], other.raw[at : at + _COMPARE_ROWS]) for at in starts)
    same = all(a.tobytes() == b.tobytes() for a, b in pairs)
    tensor.release()
    other.release()
    return same
