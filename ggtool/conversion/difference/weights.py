"""How far the weights of two models are apart, tensor by tensor, in pieces of some megabytes.

Of tensors a (the first model's) and b: relative error |a - b| / |a|, cosine distance 1 - a.b / (|a| |b|), largest
|a - b|, and the share of the squared error of all tensors. Blocks are stretches of 256 weights of a row; a block's
error is its root mean square in units of the whole tensor's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggtool.conversion.model import read_model
from ggtool.conversion.stored_rows import NOT_WEIGHTS, n_rows, read_rows, rows_at_once
from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import UsageError
from ggtool.gguf.header import GGUFHeader, TensorInfo
from ggtool.gguf.model import Artifact, open_artifact
from ggtool.source.quantized.tensor import ComputedTensor
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import StageProgress

BLOCK = 256
_N_WORST = 3

Floats = npt.NDArray[np.float32]
Pieces = Callable[[], Iterator[tuple[int, Floats]]]


@dataclass(frozen=True)
class Side:
    """One of the two models: its tensors by GGUF name, and its header where it is a GGUF file."""

    name: str
    tensors: Mapping[str, SideTensor]
    header: GGUFHeader | None


@dataclass(frozen=True)
class SideTensor:
    """A tensor of a side: shape, type ("Q4_K", or a checkpoint's "BF16"), stored bytes, and its rows as float32."""

    shape: tuple[int, ...]
    type_name: str
    n_bytes: int
    pieces: Pieces


@dataclass(frozen=True)
class WorstBlock:
    """Where a block begins, and its error in units of the tensor's own root mean square."""

    row: int
    column: int
    error: float


@dataclass(frozen=True)
class TensorDifference:
    """How far a tensor is from the other side's.

    Attributes:
        name: its GGUF name.
        shape: of both.
        types: of the first and of the second model.
        n_bytes: likewise.
        relative: |a - b| / |a|; infinite where a is all zeros and b is not.
        cosine_distance: 1 - the cosine of the angle between the two; 0 for tensors that are the same.
        largest: the largest |a - b|.
        share: of the squared error of all tensors that were compared.
        n_differing: weights that are not the same.
        n_not_finite: weights that are NaN or infinite on either side, and were left out of all but `n_differing`.
        worst: the worst blocks, worst first.

    """

    name: str
    shape: tuple[int, ...]
    types: tuple[str, str]
    n_bytes: tuple[int, int]
    relative: float
    cosine_distance: float
    largest: float
    share: float
    n_differing: int
    n_not_finite: int
    worst: tuple[WorstBlock, ...]


@dataclass(frozen=True)
class WeightsDifference:
    """All tensors: those of one side only, those of another shape, and the rest compared, most relative error first."""

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tensors: tuple[TensorDifference, ...]


def gguf_side(path: Path) -> Side:
    """Open a GGUF file, or the first part of one that is split."""
    artifact = open_artifact(path)
    return Side(
        str(path),
        {tensor.name: _stored(artifact, tensor) for tensor in artifact.header.tensors},
        artifact.header,
    )


def source_side(source: ModelSource, name: str) -> Side:
    """Open a checkpoint as the GGUF it would become: names, transposes and permutations done, nothing quantized."""
    tensors = read_model(source).tensors
    return Side(name, {tensor.name: _original(tensor) for tensor in tensors}, None)


def compare_weights(
    first: Side,
    second: Side,
    *,
    wanted: Callable[[str], bool] = lambda _name: True,
    threads: int = 1,
    progress: StageProgress | None = None,
) -> WeightsDifference:
    """Compare all tensors whose name is `wanted`; progress("comparing", weights done, weights in all).

    Raises UsageError where no tensor is wanted, ArtifactError for a file that cannot be read.
    """
    names = [name for name in dict.fromkeys([*first.tensors, *second.tensors]) if wanted(name)]
    if not names:
        raise UsageError("no tensor has such a name; `ggtool inspect` lists them.")
    both = [name for name in names if name in first.tensors and name in second.tensors]
    reshaped = {
        name: (first.tensors[name].shape, second.tensors[name].shape)
        for name in both
        if first.tensors[name].shape != second.tensors[name].shape
    }
    alike = [name for name in both if name not in reshaped and not _is_other_data(first, second, name)]
    total, done = sum(math.prod(first.tensors[name].shape) for name in alike), 0
    found: list[tuple[TensorDifference, float]] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="diff")
    try:
        futures = [pool.submit(_compare, name, first.tensors[name], second.tensors[name]) for name in alike]
        for future in as_completed(futures):
            found.append(future.result())
            done += math.prod(found[-1][0].shape)
            if progress:
                progress("comparing", done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    whole = sum(squared for _, squared in found)
    tensors = [replace(one, share=squared / whole if whole else 0.0) for one, squared in found]
    tensors.sort(key=lambda one: (-one.relative, one.name))
    return WeightsDifference(
        tuple(name for name in names if name not in second.tensors),
        tuple(name for name in names if name not in first.tensors),
        reshaped,
        tuple(tensors),
    )


def _is_other_data(first: Side, second: Side, name: str) -> bool:
    return bool({first.tensors[name].type_name, second.tensors[name].type_name} & NOT_WEIGHTS)


def _stored(artifact: Artifact, tensor: TensorInfo) -> SideTensor:
    return SideTensor(tensor.shape, tensor.type_name, tensor.n_bytes, lambda: read_rows(artifact, tensor))


def _original(tensor: ModelTensor) -> SideTensor:
    def pieces() -> Iterator[tuple[int, Floats]]:
        total, step = n_rows(tensor.shape), rows_at_once(tensor.n_per_row)
        for begin in range(0, total, step):
            yield begin, tensor.rows(begin, min(begin + step, total))
        tensor.source.release()

    kind = "packed" if isinstance(tensor.source, ComputedTensor) else tensor.source.dtype
    return SideTensor(tensor.shape, kind, tensor.source.n_bytes, pieces)


def _compare(name: str, first: SideTensor, second: SideTensor) -> tuple[TensorDifference, float]:
    """Return the difference without its share, and the sum of squared errors."""
    sums = np.zeros(3)  # of a², b² and (a - b)²
    largest, n_differing, n_not_finite = 0.0, 0, 0
    blocks: list[tuple[float, int, int]] = []
    for (begin, a), (_, b) in zip(first.pieces(), second.pieces(), strict=True):
        n_differing += int(np.count_nonzero(a != b))
        bad = ~(np.isfinite(a) & np.isfinite(b))
        if bad.any():
            n_not_finite += int(np.count_nonzero(bad))
            a, b = np.where(bad, 0, a), np.where(bad, 0, b)
        wide, other = a.astype(np.float64), b.astype(np.float64)
        error = wide - other
        sums += [np.vdot(wide, wide), np.vdot(other, other), np.vdot(error, error)]
        largest = max(largest, float(np.abs(error).max(initial=0.0)))
        blocks = heapq.nlargest(_N_WORST, [*blocks, *_worst(error, begin)])
    count = math.prod(first.shape)
    norm, other_norm = math.sqrt(sums[0]), math.sqrt(sums[1])
    rms = norm / math.sqrt(count)
    relative = math.sqrt(sums[2]) / norm if norm else (math.inf if sums[2] else 0.0)
    # From the error and not from the product: 1 - cosine would be lost in rounding where the two are close.
    product = 2 * norm * other_norm
    distance = max(0.0, (sums[2] - (norm - other_norm) ** 2) / product) if product else float(sums[2] > 0)
    worst = tuple(
        WorstBlock(row, column, error / rms if rms else math.inf) for error, row, column in blocks if error
    )
    difference = TensorDifference(
        name,
        first.shape,
        (first.type_name, second.type_name),
        (first.n_bytes, second.n_bytes),
        relative,
        distance,
        largest,
        0.0,
        n_differing,
        n_not_finite,
        worst,
    )
    return difference, float(sums[2])


def _worst(error: npt.NDArray[np.float64], begin: int) -> list[tuple[float, int, int]]:
    """Return the worst blocks of some rows: (root mean square error, row, first column)."""
    starts = np.arange(0, error.shape[1], BLOCK)
    sizes = np.diff([*starts, error.shape[1]])
    mean = np.add.reduceat(np.square(error), starts, axis=1) / sizes  # (rows, blocks)
    flat = mean.reshape(-1)
    top = np.argpartition(flat, -_N_WORST)[-_N_WORST:] if flat.size > _N_WORST else np.arange(flat.size)
    return [
        (math.sqrt(flat[at]), begin + int(at) // len(starts), int(starts[at % len(starts)])) for at in top
    ]
