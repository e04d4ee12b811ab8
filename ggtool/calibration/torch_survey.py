"""What each matrix of a model costs in each format: bytes, and the KL divergence when it alone is rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ggtool.calibration.allocation import Choice
from ggtool.calibration.torch_sensitivity import measure_divergences, measure_errors, rows_of
from ggtool.quantizers import Quantizer
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.matrices import find_matrices, select
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import Device, count_params, match_tensors, refuse_quantized, skeleton
from ggtool.quantizers.saving import make_quantizer
from ggtool.quantizers.selectors import ALL
from ggtool.system.progress import Progress

# The format of least error for each number of bits. Two and three ternary planes have more error than int3 and iq4,
# at more bits.
CANDIDATES = (
    "scratch-bf16",
    "scratch-int8-group",
    "scratch-int8",
    "scratch-iq4",
    "scratch-int3",
    "scratch-int2",
    "scratch-ternary",
)


MEASURED = ("scratch-iq4", "scratch-int3", "scratch-int2", "scratch-ternary")


@dataclass(frozen=True)
class Survey:
    """The cost of every candidate format for every matrix of a model.

    choices: by the first name of a matrix and by candidate. n_params: of the whole model. other_bytes: size of
    the parts that are not quantized, in float32.
    """

    choices: Mapping[str, Mapping[str, Choice]]
    n_params: int
    other_bytes: int


def float_model(folder: Path, device: Device) -> PreTrainedModel:
    """Return the float32 model of `folder`, read tensor after tensor. Raises SourceError as `load_packed` does."""
    refuse_quantized(folder)
    model = skeleton(folder)
    fill(model, match_tensors(folder, model), device)
    return model.to(device)


def survey(
    folder: Path, chunks: Tensor, device: Device, progress: Progress = lambda done, total: None
) -> Survey:
    """Measure the cost of every candidate format for every matrix of the checkpoint in `folder`.

    chunks: token ids (n_chunks, n_ctx). Memory is taken for the float model, its largest matrix once more, and the
    hidden states of the chunks. Raises SourceError as `load_packed` does, MeasureError as `measure_divergences`.
    """
    model = float_model(folder, device)
    quantizers = {name: make_quantizer(name) for name in CANDIDATES}
    measured = {name: quantizers[name] for name in MEASURED}
    matrices = select(find_matrices(model), ALL)
    divergences = measure_divergences(model, matrices, measured, chunks.to(device), progress)
    choices = {}
    for matrix in matrices:
        name, errors = matrix.names[0], measure_errors(matrix, quantizers)
        n_rows, n_columns = rows_of(matrix).shape
        choices[name] = {
            kind: Choice(
                n_rows * _row_bytes(quantizer, n_columns),
                expected_divergence(kind, divergences[name], errors),
            )
            for kind, quantizer in quantizers.items()
        }
    chosen_bytes = sum(rows_of(matrix).nbytes for matrix in matrices)
    return Survey(choices, count_params(model), weight_bytes(model) - chosen_bytes)


def expected_divergence(kind: str, measured: Mapping[str, float], errors: Mapping[str, float]) -> float:
    """Return the divergence of a candidate: measured, or in proportion to its error from the nearest that is."""
    if kind in measured:
        return measured[kind]
    if not errors[kind]:
        return 0.0
    near = min(measured, key=lambda name: abs(math.log((errors[name] or errors[kind]) / errors[kind])))
    return measured[near] * errors[kind] / errors[near] if errors[near] else 0.0


def _row_bytes(quantizer: Quantizer, n_columns: int) -> int:
    row = quantizer.quantize(torch.zeros(1, n_columns))
    return row.codes.nbytes + row.scales.nbytes
