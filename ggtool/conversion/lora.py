"""A LoRA adapter as a GGUF file that llama.cpp loads beside its base (--lora).

Each pair keeps its two matrices: `NAME.lora_a` (rank, n_in) and `NAME.lora_b` (n_out, rank), whose rows change places
as the base's weight's do when it is converted. llama.cpp multiplies their product by adapter.lora.alpha / rank, so where
a pair is scaled otherwise its B is. Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFType, GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.conversion.architectures import (
    Weight,
    architecture_name,
    evaluate,
    find_architecture,
    read_hparams,
    read_settings,
)
from ggtool.conversion.ggml import quantize_rows
from ggtool.conversion.tensors import expected_tensors
from ggtool.errors import SourceError, UsageError
from ggtool.formats import Format
from ggtool.gguf.reader import read_header
from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from ggtool.gguf.writer import aligned, encode, pack, place
from ggtool.source.lora import Adapter, LoraPair, base_name
from ggtool.system.atomic import atomic_output

# What an adapter's matrices can be; K-quants need rows of 256, and a rank has no such length.
QTYPES = ("F32", "F16", "BF16", "Q8_0")
_MOST_BLOCKS = 1 << 16


@dataclass(frozen=True)
class ConvertedAdapter:
    """The file, its size, and how many weights of the base it adapts."""

    path: Path
    n_bytes: int
    n_weights: int


def convert_adapter(
    adapter: Adapter, config: Mapping[str, Any], fmt: Format, out: Path, *, force: bool = False
) -> ConvertedAdapter:
    """Write an adapter for the base whose config.json is `config`; its weights are not needed.

    Raises UsageError for a quant type that adapters do not come in, SourceError for a base without a row of its own and
    for a weight that the base has not or that it turns in a way that no product of two matrices can follow.
    """
    if fmt.name not in QTYPES:
        raise UsageError(f"an adapter can be {', '.join(QTYPES)}, and not {fmt.name}; or pass --merge.")
    row = find_architecture(config)
    if row is None:
        raise SourceError(
            f"ggtool itself does not convert {architecture_name(config)}, so its adapters cannot be either."
        )
    hparams = read_hparams(row, read_settings(row, config))
    known: dict[str, Weight] = dict(expected_tensors(row, hparams, _MOST_BLOCKS))
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    alpha = _alpha(adapter)
    for module, pair in adapter.pairs.items():
        for piece in row.strip:
            module = module.replace(piece, "", 1)
        name = base_name(module, known)
        if name is None:
            raise SourceError(f"{adapter.folder} adapts {module}, which no {row.gguf_name} has.")
        weight = known[name]
        if weight.repeats and hparams["tied"]:
            raise SourceError(
                f"{adapter.folder} adapts {name}, and the base has no head of its own (it is tied)."
            )
        order = _row_order(weight, pair, hparams, name)
        factor = np.float32(pair.scale * pair.rank / alpha)
        arrays[f"{weight.name}.lora_a"] = pair.a.float32()
        arrays[f"{weight.name}.lora_b"] = pair.b.float32()[order] * factor
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise SourceError(f"{adapter.folder}: {name} holds a NaN or an infinity.")
    values = {
        Keys.General.ARCHITECTURE: GGUFValue(row.gguf_name, GGUFValueType.STRING),
        Keys.General.TYPE: GGUFValue(GGUFType.ADAPTER, GGUFValueType.STRING),
        Keys.Adapter.TYPE: GGUFValue("lora", GGUFValueType.STRING),
        Keys.General.NAME: GGUFValue(adapter.folder.resolve().name, GGUFValueType.STRING),
        Keys.Adapter.LORA_ALPHA: GGUFValue(alpha, GGUFValueType.FLOAT32),
        Keys.General.FILE_TYPE: GGUFValue(fmt.ftype, GGUFValueType.UINT32),
    }
    placed = place((name, array.shape, _type(fmt.name, array.shape)) for name, array in arrays.items())
    header = encode(pack(values), placed)
    with atomic_output(out, force=force) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            for tensor in placed:
                file.seek(len(header) + tensor.offset)
                file.write(quantize_rows(tensor.type_name, np.ascontiguousarray(arrays[tensor.name])).data)
            file.truncate(aligned(file.tell()))
        read_header(temporary)
    return ConvertedAdapter(out, out.stat().st_size, len(adapter.pairs))


def _alpha(adapter: Adapter) -> float:
    """Return the alpha that most pairs need no correction for: the first's scale times its rank."""
    first = next(iter(adapter.pairs.values()))
    alpha = first.scale * first.rank
    if not alpha:
        raise SourceError(f"{adapter.folder} has lora_alpha = 0, so it changes nothing.")
    return alpha


def _type(wanted: str, shape: tuple[int, ...]) -> str:
    _, block, _ = TENSOR_TYPES[TYPE_NUMBERS[wanted]]
    return wanted if shape[-1] % block == 0 else "F16"


def _row_order(
    weight: Weight, pair: LoraPair, hparams: Mapping[str, Any], name: str
) -> npt.NDArray[np.int64]:
    """Return which row of B is which row of the GGUF's weight."""
    n_out, n_in = pair.b.shape[0], pair.a.shape[1]
    shape = tuple(evaluate(part, hparams) for part in weight.shape.split())
    if shape != (n_out, n_in):
        raise SourceError(f"{pair.a.file}: {pair.a.name} adapts {n_out} x {n_in}, and {name} is {shape}.")
    numbers = np.broadcast_to(np.arange(n_out)[:, None], (n_out, n_in))
    for stored in (numbers, numbers.T):  # a Linear's, and a Conv1D's
        view = weight.view(stored, hparams)
        if not view.strides[-1] and view.size == math.prod(shape) and view.shape[-1] == n_in:
            return view[..., 0].reshape(-1)
    raise SourceError(f"{pair.a.file}: {name} is turned in a way that no adapter can follow; pass --merge.")
