"""A decoder as the engine holds it: matrices as the kernels read them, and the few numbers that tell families apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ggtool.kernels.decode import Heads, Norm
from ggtool.kernels.device_matrix import DeviceMatrix


class UnsupportedModelError(Exception):
    """The engine does not run this model in this format; the message is the reason, in a few words."""


class Matrix(Protocol):
    """What is the same about matrices on a GPU (`DeviceMatrix`) and on a CPU (`Operand`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    @property
    def codes(self) -> Tensor:
        """The tensor that most of the matrix is in."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is held."""
        ...


M = TypeVar("M", bound=Matrix)


@dataclass(frozen=True)
class ProjectionOf(Generic[M]):
    """y = W x + bias, W the rows of `parts` under each other: one matrix but where their layouts differ.

    bias: float32 (rows,) or None.
    """

    parts: tuple[M, ...]
    bias: Tensor | None = None

    @property
    def n_rows(self) -> int:
        """Results for each text."""
        return sum(part.shape[0] for part in self.parts)


@dataclass(frozen=True)
class LayerOf(Generic[M]):
    """One block: attention and a feed-forward part, each after its norm and added to the residual stream.

    projected: queries, keys and values. up: of a gated model the gate's rows and then the other factor's.
    query_norm, key_norm: float32 (head_dim,), RMS norms of single heads, or None.
    """

    attention_norm: Norm
    projected: ProjectionOf[M]
    output: ProjectionOf[M]
    feed_forward_norm: Norm
    up: ProjectionOf[M]
    down: ProjectionOf[M]
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class ModelOf(Generic[M]):
    """A whole decoder on one device.

    table: token embeddings; head: the output matrix, which may be the same. positions: float32 (n_ctx, n_embd) of
    learned positions, or None. is_gated: silu(gate) * up, or else gelu(up). dtype: of the cache and of products.
    """

    table: M
    positions: Tensor | None
    layers: tuple[LayerOf[M], ...]
    final_norm: Norm
    head: M
    heads: Heads
    is_gated: bool
    dtype: torch.dtype

    @property
    def n_embd(self) -> int:
        """Numbers in the residual stream."""
        return self.table.shape[1]

    @property
    def n_vocab(self) -> int:
        """Rows of the output head."""
        return self.head.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.table.codes.device

    @property
    def weights_bytes(self) -> int:
        """Bytes of every storage that holds weights, scales, norms or rotations, each once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in self._tensors()
        }
        return sum(storages.values())

    def matrices(self) -> Iterator[M]:
        """Yield every matrix, table and head as well."""
        yield self.table
        if self.head.codes.data_ptr() != self.table.codes.data_ptr():
            yield self.head
        for layer in self.layers:
            for projection in (layer.projected, layer.output, layer.up, layer.down):
                yield from projection.parts

    def _tensors(self) -> Iterator[Tensor]:
        for matrix in self.matrices():
            yield from matrix.tensors
        others: list[Tensor | None] = [self.positions, self.heads.rotations]
        norms = [self.final_norm]
        for layer in self.layers:
            norms += [layer.attention_norm, layer.feed_forward_norm]
            others += [layer.query_norm, layer.key_norm]
            others += [part.bias for part in (layer.projected, layer.output, layer.up, layer.down)]
        others += [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
        yield from (tensor for tensor in others if tensor is not None)


Projection: TypeAlias = ProjectionOf[DeviceMatrix]
Layer: TypeAlias = LayerOf[DeviceMatrix]
Model: TypeAlias = ModelOf[DeviceMatrix]
