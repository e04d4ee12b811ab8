"""A model cut for several GPUs: every rank has some heads, some of the feed-forward part's numbers, some of the vocabulary.

What a rank makes of its columns of an output matrix is a part of a sum over all ranks (tensor parallelism, Megatron-LM,
arXiv 1909.08053). Norms, rotations and learned positions are held by each; a bias that follows a sum by the first alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ggtool.backends.engine.model import Layer, Model, Projection, UnsupportedModelError
from ggtool.kernels.decode import Norm
from ggtool.kernels.device_matrix import DeviceMatrix, stack

# Feed-forward parts are cut where every layout can be: at whole super-blocks, or at what all have in common.
_UNITS = (256, 128, 64, 32, 16)

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """What one rank holds. first_row: the token that the first row of its table and head belongs to."""

    model: Model
    first_row: int


def split(model: Model, devices: Sequence[torch.device]) -> list[Part]:
    """Return the parts of a model, one on each device. UnsupportedModelError where it cannot be cut so."""
    n_ranks, heads = len(devices), model.heads
    if heads.n_kv_heads % n_ranks:
        raise UnsupportedModelError(f"{heads.n_kv_heads} key heads on {n_ranks} GPUs")
    n_ff = model.layers[0].down.parts[0].shape[1]
    bounds = _bounds(n_ff, n_ranks)
    return [_part(model, rank, n_ranks, bounds, device) for rank, device in enumerate(devices)]


def _part(model: Model, rank: int, n_ranks: int, bounds: list[int], device: torch.device) -> Part:
    heads = model.heads
    n_vocab = model.n_vocab
    rows = n_vocab * rank // n_ranks, n_vocab * (rank + 1) // n_ranks
    ff = bounds[rank], bounds[rank + 1]
    n_ff = bounds[-1]

    def share(n: int, first: int = 0) -> Range:
        """Return this rank's numbers of `n` heads, whose numbers begin at `first`."""
        size = n // n_ranks * heads.head_dim
        return first + rank * size, first + (rank + 1) * size

    queries = heads.n_heads * heads.head_dim
    keys = heads.n_kv_heads * heads.head_dim
    projected = [
        share(heads.n_heads), share(heads.n_kv_heads, queries), share(heads.n_kv_heads, queries + keys)
    ]  # fmt: skip
    up = [ff, (n_ff + ff[0], n_ff + ff[1])] if model.is_gated else [ff]
    is_first = rank == 0

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    def norm(one: Norm) -> Norm:
        return replace(one, weight=moved(one.weight), bias=moved(one.bias))

    def layer(one: Layer) -> Layer:
        return Layer(
            attention_norm=norm(one.attention_norm),
            projected=_rows(one.projected, projected, device),
            output=_columns(one.output, share(heads.n_heads), device, has_bias=is_first),
            feed_forward_norm=norm(one.feed_forward_norm),
            up=_rows(one.up, up, device),
            down=_columns(one.down, ff, device, has_bias=is_first),
            query_norm=moved(one.query_norm),
            key_norm=moved(one.key_norm),
        )

    table = _copied(model.table.rows(*rows), device)
    is_tied = model.head.codes.data_ptr() == model.table.codes.data_ptr()
    part = replace(
        model,
        table=table,
        positions=moved(model.positions) if is_first else None,
        layers=tuple(layer(one) for one in model.layers),
        final_norm=norm(model.final_norm),
        head=table if is_tied else _copied(model.head.rows(*rows), device),
        heads=replace(
            heads,
            n_heads=heads.n_heads // n_ranks,
            n_kv_heads=heads.n_kv_heads // n_ranks,
            rotations=moved(heads.rotations),
        ),
    )
    return Part(part, rows[0])


def _bounds(n: int, n_ranks: int) -> list[int]:
    """Return where the ranks' shares of n numbers begin, and n: of nearly one size, cut where layouts can be."""
    unit = next((unit for unit in _UNITS if n % unit == 0 and n // unit >= n_ranks), 0)
    if not unit:
        raise UnsupportedModelError(f"a feed-forward part of {n} on {n_ranks} GPUs")
    return [n // unit * rank // n_ranks * unit for rank in range(n_ranks + 1)]


def _rows(projection: Projection, ranges: Sequence[Range], device: torch.device) -> Projection:
    """Return some rows of a projection under each other."""
    pieces = []
    for first, end in ranges:
        at = 0
        for part in projection.parts:
            inside = max(first - at, 0), min(end - at, part.shape[0])
            if inside[0] < inside[1]:
                pieces.append(part.rows(*inside))
            at += part.shape[0]
    whole = stack(pieces)
    bias = projection.bias
    return Projection(
        tuple(_copied(piece, device) for piece in (pieces if whole is None else [whole])),
        None if bias is None else torch.cat([bias[first:end] for first, end in ranges]).to(device),
    )


def _columns(projection: Projection, columns: Range, device: torch.device, *, has_bias: bool) -> Projection:
    """Return some columns of a projection, its bias with one rank's alone."""
    parts = []
    for part in projection.parts:
        piece = part.columns(*columns)
        if piece is None:
            raise UnsupportedModelError(f"rows of {part.shape[1]} cut at {columns[0] or columns[1]}")
        parts.append(_copied(piece, device))
    bias = projection.bias
    return Projection(tuple(parts), bias.to(device, copy=True) if has_bias and bias is not None else None)


def _copied(matrix: DeviceMatrix, device: torch.device) -> DeviceMatrix:
    """Return a copy on a device that keeps nothing of the original."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True).contiguous()

    parts: dict[str, Tensor | None] = {
        name: None if tensor is None else copy(tensor)
        for name, tensor in (
            ("scales", matrix.scales), ("row_scales", matrix.row_scales), ("values", matrix.values)
        )
    }  # fmt: skip
    return DeviceMatrix(matrix.layout, matrix.shape, copy(matrix.codes), **parts)
