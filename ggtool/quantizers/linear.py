"""Torch modules with packed weights: the matrix, and the linear layer and token table that use it.

Nothing is held dequantized. The matrix is a module of its own because a tied table has two users, and a shared
submodule stays shared through `.to()` and when modules are iterated.
"""

from __future__ import annotations

from torch import Tensor, nn

from ggtool.kernels import gpu, native
from ggtool.quantizers import QuantizedTensor, Quantizer


class PackedMatrix(nn.Module):
    """A quantized matrix (rows, columns) and its quantizer; buffers: codes and scales."""

    codes: Tensor
    scales: Tensor

    def __init__(self, quantizer: Quantizer, quantized: QuantizedTensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.shape = quantized.shape
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scales", quantized.scales)

    @property
    def quantized(self) -> QuantizedTensor:
        """The codes and scales on their current device."""
        return QuantizedTensor(self.codes, self.scales, self.shape)

    def extra_repr(self) -> str:
        """Show the shape and the quantizer in `print(model)`."""
        return f"{self.shape[0]}, {self.shape[1]}, {type(self.quantizer).__name__}"


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias for a packed W (out_features, in_features), in place of nn.Linear or Conv1D."""

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.matrix = matrix
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of `x`."""
        return self.matrix.quantizer.matmul(x, self.matrix.quantized, self.bias)


class QuantizedEmbedding(nn.Module):
    """Rows of a packed table (num_embeddings, embedding_dim) by index, in place of nn.Embedding."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.matrix = matrix

    def forward(self, indices: Tensor) -> Tensor:
        """Integer (...) to float32 (..., embedding_dim)."""
        return self.matrix.quantizer.gather(indices, self.matrix.quantized)


def product_ways() -> dict[str, str]:
    """Return how packed products were computed in this process, on the CPU and on the GPU, if at all."""
    ways = {"cpu_products": native.description(), "gpu_products": gpu.description()}
    return {name: way for name, way in ways.items() if way is not None}
