"""Gather facts about a model's weights and its GGUF file for a report.

Weights: the matrices of the blocks, sampled evenly, in the orientation and the groups that quantizers see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from ggtool.conversion.model import read_model
from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import SourceError
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.model import is_matrix
from ggtool.gguf.reader import read_header
from ggtool.quantizers.search import nearest
from ggtool.quantizers.tables import FP4_VALUES, IQ4_VALUES, NF4_VALUES, TableQuantizer, linear
from ggtool.results.model_facts import GGUFFacts, GGUFKey, GGUFTensor, LevelSet, WeightFacts
from ggtool.source.resolve import ModelSource

BLOCK = 64  # weights that share a largest one, as in bitsandbytes' 4-bit formats
_SAMPLED_WEIGHTS = 1 << 18
_RUNS = 16
_BINS = 160
_TABLES = {"linear int4": linear(4), "FP4": FP4_VALUES, "NF4": NF4_VALUES, "IQ4": IQ4_VALUES}
_SHOWN = 60  # characters of a key's value


def survey_weights(source: ModelSource) -> WeightFacts:
    """Sample the matrices of all blocks, and round them to the four tables of 16 values.

    Raises SourceError when the checkpoint cannot be read.
    """
    with _one_thread():
        return _survey(source)


def _survey(source: ModelSource) -> WeightFacts:
    tensors = [
        tensor
        for tensor in read_model(source).tensors
        if tensor.name.startswith("blk.")
        and is_matrix(tensor.name, tensor.shape)
        and tensor.n_per_row >= BLOCK
    ]
    if not tensors:
        raise SourceError(
            f"{source.model} has no matrix in its blocks with rows of at least {BLOCK} weights."
        )
    sampled = [torch.from_numpy(_sample(tensor, _SAMPLED_WEIGHTS // len(tensors))) for tensor in tensors]
    units = torch.cat([_units(weight) for weight in sampled])
    density, edges = np.histogram(units[units.abs() < 1].numpy(), bins=_BINS, range=(-1, 1), density=True)
    return WeightFacts(
        model=source.model,
        n_matrices=len(tensors),
        n_weights=sum(weight.numel() for weight in sampled),
        edges=tuple(edges.tolist()),
        density=tuple(density.tolist()),
        levels=tuple(_level_set(name, values, sampled) for name, values in _TABLES.items()),
    )


def read_gguf(path: Path) -> GGUFFacts:
    """Return the facts in a GGUF file's header; ArtifactError if it cannot be read."""
    header = read_header(path)
    with path.open("rb") as file:
        head = file.read(24)
    return GGUFFacts(
        file=path.name,
        n_bytes=path.stat().st_size,
        head=head.hex(" "),
        version=header.version,
        alignment=header.alignment,
        data_offset=header.data_offset,
        keys=tuple(
            GGUFKey(name, _type_name(header.types[name], value), _shown(value))
            for name, value in header.metadata.items()
        ),
        tensors=tuple(
            GGUFTensor(t.name, t.shape, t.type_name, t.offset, t.n_bytes, t.n_params) for t in header.tensors
        ),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch with one thread: the pieces are small, and on a busy machine several threads take four times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sample(tensor: ModelTensor, n_weights: int) -> npt.NDArray[np.float32]:
    """Return about `n_weights` weights of a matrix: whole rows, evenly spread, (rows, n_per_row)."""
    n_runs = min(_RUNS, tensor.n_rows)
    length = max(1, min(tensor.n_rows, n_weights // tensor.n_per_row) // n_runs)
    begins = [run * tensor.n_rows // n_runs for run in range(n_runs)]
    rows = np.concatenate([tensor.rows(begin, begin + length) for begin in begins])
    tensor.source.release()
    return rows


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Yield whole blocks (n_blocks, block); an incomplete block at a row's end is left out."""
    whole = weight.shape[1] // BLOCK * BLOCK
    if whole:
        yield weight[:, :whole].reshape(-1, BLOCK)


def _units(weight: Tensor) -> Tensor:
    found = [block / block.abs().amax(1, keepdim=True).clamp_min(1e-30) for block in _blocks(weight)]
    return torch.cat(found).flatten() if found else torch.empty(0)


def _level_set(name: str, values: tuple[float, ...], sampled: list[Tensor]) -> LevelSet:
    quantizer = TableQuantizer(values)
    at_end = torch.tensor(values) / values[-1]
    power = noise = absmax_power = absmax_noise = 0.0
    counts = torch.zeros(len(values), dtype=torch.int64)
    for weight in sampled:
        quantized = quantizer.quantize(weight)
        power += _energy(weight)
        noise += _energy(quantizer.dequantize(quantized) - weight)
        counts += torch.bincount(quantizer.codes(quantized).flatten().int(), minlength=len(values))
        for block in _blocks(weight):
            scale = block.abs().amax(1, keepdim=True).clamp_min(1e-30)
            rounded = at_end[nearest(block / scale, at_end)] * scale
            absmax_power += _energy(block)
            absmax_noise += _energy(rounded - block)
    shares = (counts / counts.sum()).tolist()
    return LevelSet(
        name=name,
        values=tuple(float(value) for value in values),
        absmax_error=absmax_noise / absmax_power if absmax_power else 0.0,
        searched_error=noise / power if power else 0.0,
        code_bits=-sum(share * math.log2(share) for share in shares if share),
    )


def _energy(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _type_name(kind: int, value: object) -> str:
    if isinstance(value, ArrayRef):
        return f"array of {GGUFValueType(value.type).name.lower()}"
    return str(GGUFValueType(kind).name.lower())


def _shown(value: object) -> str:
    if isinstance(value, ArrayRef):
        return f"{value.length:,} elements, {value.n_bytes:,} bytes"
    words = " ".join(str(value).split())
    return words if len(words) <= _SHOWN else words[: _SHOWN - 1] + "…"
