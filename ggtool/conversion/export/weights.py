"""A GGUF's tensors under their names in a checkpoint, each written through the view that converting looks through.

Converting reads a stored array through a row's `view`; exporting makes an empty array of the stored shape, looks at it
through the same view, and writes into what it sees. So permutations and transposes need no inverse of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.conversion.architectures import Weight, evaluate
from ggtool.conversion.export.rope import LLAMA3_TENSOR, LONGROPE_TENSORS
from ggtool.conversion.export.settings import Settings
from ggtool.conversion.tensors import expected_tensors
from ggtool.errors import ArtifactError
from ggtool.gguf.header import GGUFHeader, TensorInfo

# Rope tables that config.json holds; others are llama.cpp's own affair and refused.
_FROM_CONFIG = {LLAMA3_TENSOR, *LONGROPE_TENSORS.values()}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the checkpoint: its name there, the shape it is stored in, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    weight: Weight

    @property
    def n_params(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def match_tensors(header: GGUFHeader, settings: Settings) -> list[ExportedTensor]:
    """Return every tensor of the checkpoint, in the order of the GGUF.

    Raises ArtifactError for one that is missing, left over or of another shape.
    """
    expected = {
        weight.name: (name, weight)
        for name, weight in expected_tensors(settings.row, settings.hparams, len(header.tensors))
    }
    present = {tensor.name: tensor for tensor in header.tensors if tensor.name not in _FROM_CONFIG}
    missing = [
        gguf_name
        for gguf_name, (_, weight) in expected.items()
        if gguf_name not in present and not (weight.repeats and settings.hparams["tied"])
    ]
    if missing:
        raise ArtifactError(f"{header.path} lacks {len(missing)} tensors, the first is {missing[0]}.")
    if extra := [name for name in present if name not in expected]:
        raise ArtifactError(
            f"{header.path} has {len(extra)} tensors that no {settings.row.gguf_name} of transformers has, the first "
            f"is {extra[0]}."
        )
    return [_match(header, tensor, *expected[tensor.name], settings.hparams) for tensor in present.values()]


def _match(
    header: GGUFHeader, tensor: TensorInfo, name: str, weight: Weight, hparams: Mapping[str, Any]
) -> ExportedTensor:
    if weight.only_copy:
        raise ArtifactError(
            f"{header.path} has a head of its own ({tensor.name}), which its architecture has not."
        )
    wanted = tuple(evaluate(part, hparams) for part in weight.shape.split())
    for shape in (wanted, wanted[::-1]) if tensor.shape == wanted else ():
        try:
            view = weight.view(np.broadcast_to(np.zeros((), np.uint8), shape), hparams)
        except ValueError:  # no whole number of heads
            continue
        if view.size == math.prod(wanted) and view.shape[-1] == wanted[-1]:
            return ExportedTensor(name, shape, tensor, weight)
    raise ArtifactError(
        f"{header.path}: {tensor.name} has the shape {tensor.shape}, and the file's keys make it {wanted}."
    )


def fill(
    out: npt.NDArray[Any],
    tensor: ExportedTensor,
    pieces: Iterator[tuple[int, Floats]],
    hparams: Mapping[str, Any],
) -> None:
    """Write the rows of the GGUF's tensor, which come as (first row, float32 rows), where they lie in `out`.

    `out` is of the stored shape and of any float type; a bfloat16 is a uint16.
    """
    if out.ndim == 1:
        order = tensor.weight.view(np.arange(out.size), hparams)
        for _, rows in pieces:
            out[order] = _narrow(rows.reshape(-1) - np.float32(tensor.weight.plus), out.dtype, tensor.name)
        return
    target = tensor.weight.view(out, hparams)
    assert np.shares_memory(target, out), f"the view of {tensor.name} copies"
    for first, rows in pieces:
        values = rows - np.float32(tensor.weight.plus) if tensor.weight.plus else rows
        numbers = np.arange(first, first + len(rows))
        where = (
            slice(first, first + len(rows))
            if target.ndim == 2
            else np.unravel_index(numbers, target.shape[:-1])
        )
        target[where] = _narrow(values, out.dtype, tensor.name)


def _narrow(values: Floats, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    if dtype == np.uint16:
        pattern = values.view(np.uint32)
        return ((pattern + (0x7FFF + (pattern >> 16 & 1))) >> 16).astype(np.uint16)
    if dtype == np.float16:
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if not np.array_equal(np.isfinite(narrow), np.isfinite(values)):
            raise ArtifactError(f"tensor {name} has weights too large for float16; pass --dtype f32 or bf16.")
        return narrow
    return values
