"""Load a checkpoint straight into packed modules, one tensor at a time.

A float matrix is freed as soon as it is packed, so peak memory is about the packed size plus the largest matrix in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.errors import SourceError
from ggtool.quantizers import Quantizer
from ggtool.quantizers.finite import is_finite
from ggtool.quantizers.linear import PackedMatrix, QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.matrices import Matrix, find_matrices, select
from ggtool.quantizers.pretrained import Device, match_tensors, refuse_quantized, skeleton
from ggtool.quantizers.selectors import ALL
from ggtool.source.safetensors import LazyTensor
from ggtool.system.progress import Progress


def load_packed(
    folder: Path,
    quantizer: Quantizer,
    device: Device,
    components: str = ALL,
    progress: Progress = lambda done, total: None,
    quantize_on: str | None = None,
) -> PreTrainedModel:
    """Return the model of `folder` with the matrices that `components` names quantized, the rest float32.

    The token table and the output head are quantized as `quantizer.for_tables` does. progress: matrices done, of all.
    quantize_on: where matrices are quantized one by one, if not on `device`.

    Raises SourceError when the checkpoint does not fit its config or holds a weight that is not finite.
    """
    refuse_quantized(folder)
    model = skeleton(folder)
    tensors = match_tensors(folder, model)
    matrices = select(find_matrices(model), components)
    pack_matrices(model, matrices, tensors, quantizer, quantize_on or device, progress, keep_on=device)
    fill(model, tensors, device)
    return model.to(device)  # moves the buffers; everything else is on the device already


def pack_matrices(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    tensors: dict[str, LazyTensor],
    quantizer: Quantizer,
    device: str,
    progress: Progress = lambda done, total: None,
    keep_on: Device | None = None,
) -> None:
    """Replace `matrices` of a skeleton by packed ones, made on `device`, taking their weights out of `tensors`."""
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    for done, matrix in enumerate(matrices):
        progress(done, len(matrices))
        chosen = quantizer.for_tables if any(module in tables for module in matrix.modules) else quantizer
        pack_matrix(model, matrix, tensors, chosen, device, keep_on)


def pack_matrix(
    model: PreTrainedModel,
    matrix: Matrix,
    tensors: dict[str, LazyTensor],
    quantizer: Quantizer,
    device: str,
    keep_on: Device | None = None,
) -> None:
    """Replace one matrix of a skeleton by a packed one, taking its weights out of `tensors`.

    device: where it is quantized; keep_on: where it is kept, if elsewhere.
    """
    # named_modules and named_parameters iterate in the same order, so first names agree.
    weight = _read(tensors.pop(f"{matrix.names[0]}.weight"), device)
    if isinstance(matrix.modules[0], Conv1D):
        weight = weight.t().contiguous()  # Conv1D keeps (in_features, out_features)
    packed = PackedMatrix(quantizer, quantizer.quantize(weight))
    install(model, matrix, packed if keep_on is None else packed.to(keep_on))


def install(model: nn.Module, matrix: Matrix, packed: PackedMatrix) -> None:
    """Replace all modules that use `matrix` by packed ones; a linear layer keeps its bias."""
    for name, module in zip(matrix.names, matrix.modules, strict=True):
        if isinstance(module, nn.Embedding):
            model.set_submodule(name, QuantizedEmbedding(packed))
        else:
            model.set_submodule(name, QuantizedLinear(packed, cast(nn.Parameter | None, module.bias)))


def fill(model: nn.Module, tensors: Mapping[str, LazyTensor], device: Device) -> None:
    """Load every parameter that is still empty; tied parameters share one tensor."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append((module, leaf))
    for name, tensor in tensors.items():
        empty = model.get_parameter(name)
        value = nn.Parameter(_read(tensor, device), requires_grad=False)
        for module, leaf in users[id(empty)]:
            setattr(module, leaf, value)


def _read(tensor: LazyTensor, device: str) -> Tensor:
    """Return a float32 copy of `tensor` on `device`; SourceError if a weight is not finite."""
    array = tensor.float32()
    if not array.flags.writeable:
        array = array.copy()  # still the mapped file
    tensor.release()
    value = torch.from_numpy(array)
    if not is_finite(value):
        raise SourceError(f"tensor {tensor.name} in {tensor.file} holds a weight that is not finite.")
    return value.to(device)
