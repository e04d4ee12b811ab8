"""Preview the format of each matrix of a model on a skeleton of meta tensors, without reading weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.formats import Format
from ggtool.quantizers import load_attribute
from ggtool.quantizers.bnb import BitsAndBytes
from ggtool.quantizers.matrices import Matrix, find_matrices, select
from ggtool.quantizers.pretrained import Device, refuse_quantized, skeleton
from ggtool.quantizers.saving import make_quantizer, quantizer_name


@dataclass(frozen=True)
class HeldMatrix:
    """One matrix: the names of the modules that use it, its shape (rows, columns) as in y = x @ W.T, its format.

    held_as: a row of QUANTIZERS such as "scratch-int8", or "float" for a matrix that stays float.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    held_as: str


def preview(fmt: Format, folder: Path, device: Device, components: str) -> list[HeldMatrix]:
    """Return every matrix of the checkpoint in `folder` as `fmt` with this selector would hold it.

    Raises SourceError for a checkpoint that cannot be read, UsageError for a selector that names nothing.
    """
    refuse_quantized(folder)
    model = skeleton(folder)
    matrices = find_matrices(model)
    held = {matrix.names: _FLOAT for matrix in matrices}
    found = None if fmt.quantizer is None else load_attribute(fmt.quantizer)
    if isinstance(found, BitsAndBytes):
        held |= dict.fromkeys(found.replaced(model, device), fmt.backend)
    elif fmt.quantizer is not None:
        quantizer = make_quantizer(fmt.quantizer)
        tables = _tables(model)
        for matrix in select(matrices, components):
            is_table = not tables.isdisjoint(matrix.names)
            own = fmt.backend if fmt.method else fmt.quantizer
            held[matrix.names] = quantizer_name(quantizer.for_tables) if is_table else own
    return [HeldMatrix(matrix.names, _shape(matrix), held[matrix.names]) for matrix in matrices]


_FLOAT = "float"


def _tables(model: PreTrainedModel) -> set[str]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name for name, module in model.named_modules() if module in ends}


def _shape(matrix: Matrix) -> tuple[int, int]:
    module = matrix.modules[0]
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
