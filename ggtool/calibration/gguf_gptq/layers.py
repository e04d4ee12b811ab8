"""The linear layers of a model beside the GGUF tensors that they become, whose rows may lie in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.conversion.tensors import ModelTensor
from ggtool.quantizers.matrices import find_matrices
from ggtool.source.safetensors import LazyTensor

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A linear layer or a table, and the GGUF tensors that it becomes; `order` is the layer's output of each row of the matrix."""

    weight: ModelTensor
    bias: ModelTensor | None
    order: npt.NDArray[np.int32]


def find_layers(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor], found: Sequence[ModelTensor]
) -> dict[str, Layer]:
    """Return the layers whose weights become a matrix of the file, by their first name in the model."""
    by_stored = {tensor.source.name: tensor for tensor in found}
    layers = {}
    for matrix in find_matrices(model):
        name = matrix.names[0]
        weight = by_stored.get(tensors[f"{name}.weight"].name)
        if weight is not None:
            bias = tensors.get(f"{name}.bias")
            layers[name] = Layer(
                weight,
                None if bias is None else by_stored.get(bias.name),
                _order(weight, 1 if isinstance(matrix.modules[0], Conv1D) else 0),
            )
    return layers


def _order(weight: ModelTensor, axis: int) -> npt.NDArray[np.int32]:
    """Return which output of the layer each row of the file's matrix is; `axis` is the outputs' in the checkpoint."""
    raw = weight.source.raw
    numbers = np.empty(raw.shape, np.int32)
    numbers[...] = np.arange(raw.shape[axis]).reshape(-1, 1) if axis == 0 else np.arange(raw.shape[axis])
    strides = [stride // raw.itemsize * numbers.itemsize for stride in weight.view.strides]
    seen = np.lib.stride_tricks.as_strided(numbers, weight.view.shape, strides)
    return seen[..., 0].reshape(-1).copy()


def put(module: nn.Module, layer: Layer, rows: Floats, bias: Floats | None) -> None:
    """Put a matrix of the file, and a bias, into the layer that it came from."""
    turned = np.empty_like(rows)
    turned[layer.order] = rows
    weight = cast(nn.Parameter, module.weight)
    value = torch.from_numpy(turned.T.copy() if isinstance(module, Conv1D) else turned)
    weight.data = value.to(weight)
    if bias is not None:
        own = cast(nn.Parameter, module.bias)
        turned_bias = np.empty_like(bias)
        turned_bias[layer.order] = bias
        own.data = torch.from_numpy(turned_bias).to(own)
