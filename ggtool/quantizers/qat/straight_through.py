"""Modules for quantization-aware training: float weights that are quantized in the forward pass.

The straight-through estimator (Bengio et al., arXiv 1308.3432): forward uses the rounded weights, backward
passes their gradient to the float weights as if nothing had been rounded. Scales are searched in each forward
pass with the format's own search, so the trained weights are exactly the saved ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.quantizers import Quantizer
from ggtool.quantizers.linear import PackedMatrix, QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.matrices import Matrix, find_matrices, select
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import Device, initialized, match_tensors, refuse_quantized
from ggtool.quantizers.selectors import ALL


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor, quantizer: Quantizer) -> Tensor:
        return quantizer.round_trip(weight)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class TrainedMatrix(nn.Module):
    """A trainable float32 matrix (rows, columns) and its quantizer."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the matrix quantized and restored, float32; the gradient passes straight through."""
        rounded = _StraightThrough.apply(self.weight, self.quantizer)  # type: ignore[no-untyped-call]
        return cast(Tensor, rounded)


class TrainedLinear(nn.Module):
    """y = x @ W.T + bias, in place of nn.Linear or Conv1D; W is rounded, and under autocast then cast."""

    bias: nn.Parameter | None

    def __init__(self, matrix: TrainedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.weight.shape
        self.matrix = matrix
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return F.linear(x, self.matrix(), self.bias)


class TrainedEmbedding(nn.Module):
    """Rows of a rounded table (num_embeddings, embedding_dim) by index, in place of nn.Embedding."""

    def __init__(self, matrix: TrainedMatrix) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.weight.shape
        self.matrix = matrix

    def forward(self, indices: Tensor) -> Tensor:
        """Integer (...) to float32 (..., embedding_dim)."""
        return F.embedding(indices, self.matrix())


def load_trainable(folder: Path, device: Device) -> PreTrainedModel:
    """Return the float32 model of `folder` with every parameter trained and dropout off, nothing quantized.

    Raises SourceError when the checkpoint does not fit its config or holds a weight that is not finite.
    """
    refuse_quantized(folder)
    model = initialized(folder)
    fill(model, match_tensors(folder, model), device)
    return model.to(device).eval().requires_grad_(True)


def load_trained(
    folder: Path, quantizer: Quantizer, device: Device, components: str = ALL
) -> PreTrainedModel:
    """Return the float32 model of `folder` whose matrices named by `components` are quantized in the forward pass.

    Token table and output head use `quantizer.for_tables`. Every parameter is trained; dropout is off.
    Raises what `load_packed` raises.
    """
    model = load_trainable(folder, device)
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    for matrix in select(find_matrices(model), components):
        chosen = quantizer.for_tables if any(module in tables for module in matrix.modules) else quantizer
        _install_trained(model, matrix, chosen)
    return model


def pack_trained(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the trained matrices by packed ones with exactly the same values."""
    with torch.no_grad():
        for trained, users in _trained_matrices(model).items():
            packed = PackedMatrix(trained.quantizer, trained.quantizer.quantize(trained.weight.detach()))
            for name, user in users:
                if isinstance(user, TrainedEmbedding):
                    model.set_submodule(name, QuantizedEmbedding(packed))
                else:
                    model.set_submodule(name, QuantizedLinear(packed, user.bias))
    return model.requires_grad_(False)


def _install_trained(model: nn.Module, matrix: Matrix, quantizer: Quantizer) -> None:
    first = matrix.modules[0]
    weight = cast(Tensor, first.weight).detach()
    # Conv1D keeps (in_features, out_features).
    trained = TrainedMatrix(quantizer, weight.t().contiguous() if isinstance(first, Conv1D) else weight)
    for name, module in zip(matrix.names, matrix.modules, strict=True):
        if isinstance(module, nn.Embedding):
            model.set_submodule(name, TrainedEmbedding(trained))
        else:
            model.set_submodule(name, TrainedLinear(trained, cast(nn.Parameter | None, module.bias)))


def _trained_matrices(
    model: nn.Module,
) -> dict[TrainedMatrix, list[tuple[str, TrainedLinear | TrainedEmbedding]]]:
    users: dict[TrainedMatrix, list[tuple[str, TrainedLinear | TrainedEmbedding]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedLinear | TrainedEmbedding):
            users.setdefault(module.matrix, []).append((name, module))
    return users
