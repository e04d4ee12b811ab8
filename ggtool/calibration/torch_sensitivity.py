"""Sensitivity of a model's predictions to rounding one matrix, measured with torch one matrix at a time.

The matrix alone is rounded, the rest stays float, and the mean KL divergence of the next-token predictions to the
float model's is taken over the second half of each chunk, in nats. Blocks before the rounded one are not run again:
their outputs are kept.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.calibration.blocks import Blocks, block_names
from ggtool.calibration.predictions import Predictions
from ggtool.errors import MeasureError
from ggtool.quantizers import Quantizer
from ggtool.quantizers.matrices import Matrix
from ggtool.system.progress import Progress

# Weights rounded at a time, to bound memory for large token tables.
_WEIGHTS_AT_ONCE = 1 << 20
# Weights that a format's error is estimated on, in whole rows spread evenly.
_SAMPLED_WEIGHTS = 1 << 18


def measure_divergences(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    quantizers: Mapping[str, Quantizer],
    chunks: Tensor,
    progress: Progress = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Return {first name of a matrix: {name of a quantizer: mean KL divergence in nats}}.

    model: float32, unchanged afterwards; chunks: token ids (n_chunks, n_ctx) on its device. Raises MeasureError
    for predictions that are not finite.
    """
    found: dict[str, dict[str, float]] = {matrix.names[0]: {} for matrix in matrices}
    done, total = 0, len(matrices) * len(quantizers)
    with torch.no_grad(), tempfile.TemporaryFile(prefix="ggtool-predictions-") as file:
        predictions = Predictions(model, chunks, file)
        predictions.keep(Blocks(model, chunks).rest(0))
        for matrix, run in _with_runs(model, matrices, chunks):
            for name, quantizer in quantizers.items():
                with _rounded(matrix, quantizer):
                    kld = predictions.divergence(run())
                if not math.isfinite(kld):
                    raise MeasureError(f"{matrix.names[0]} as {name} makes predictions that are not finite.")
                found[matrix.names[0]][name] = kld
                done += 1
                progress(done, total)
    return found


def measure_errors(matrix: Matrix, quantizers: Mapping[str, Quantizer]) -> dict[str, float]:
    """Return {name of a quantizer: squared error of a float matrix as a share of its power}; 0 for one of zeros."""
    weight = rows_of(matrix)
    n_rows = min(len(weight), max(1, _SAMPLED_WEIGHTS // weight.shape[1]))
    rows = torch.linspace(0, len(weight) - 1, n_rows, dtype=torch.float64).long()
    sample = weight[rows.to(weight.device)].contiguous()
    power = float(sample.square().sum(dtype=torch.float64))
    return {
        name: float((quantizer.round_trip(sample) - sample).square().sum(dtype=torch.float64))
        / (power or 1.0)
        for name, quantizer in quantizers.items()
    }


def rows_of(matrix: Matrix) -> Tensor:
    """Return the weight of a float matrix as (rows, columns), a view of it: Conv1D keeps it turned."""
    module = matrix.modules[0]
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def _with_runs(
    model: PreTrainedModel, matrices: Sequence[Matrix], chunks: Tensor
) -> Iterator[tuple[Matrix, Callable[[], Iterator[Tensor]]]]:
    """Yield each matrix with a function that runs the model from its block on and yields the last hidden states."""
    names = block_names(model)
    of_block: dict[int, list[Matrix]] = {index: [] for index in range(-1, len(names))}
    for matrix in matrices:
        of_block[_block_of(matrix, names)].append(matrix)
    for matrix in of_block[-1]:
        # It may be the token table, which changes the first block's input.
        yield matrix, lambda: Blocks(model, chunks).rest(0)
    blocks = Blocks(model, chunks)
    for index in range(len(names)):
        for matrix in of_block[index]:
            yield matrix, lambda index=index: blocks.rest(index)  # type: ignore[misc]  # mypy infers no type for it
        blocks.advance(index)


def _block_of(matrix: Matrix, names: Sequence[str]) -> int:
    """Return the number of the block that a matrix is in, -1 outside of them."""
    return next((i for i, name in enumerate(names) if matrix.names[0].startswith(f"{name}.")), -1)


@contextmanager
def _rounded(matrix: Matrix, quantizer: Quantizer) -> Iterator[None]:
    """Round a float matrix with the quantizer while the block runs."""
    weight = rows_of(matrix)
    original = weight.clone()
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    try:
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            weight[rows] = quantizer.round_trip(original[rows].contiguous())
        yield
    finally:
        weight.copy_(original)
