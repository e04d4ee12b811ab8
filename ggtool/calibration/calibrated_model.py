"""Quantize a checkpoint with a calibration text, one decoder block after the other.

Each block is loaded in float, fed the outputs of the packed blocks before it, quantized, and run again to feed the
next. Memory holds one float block, the packed model and the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.awq import search_factors
from ggtool.calibration.blocks import Blocks, block_names, refuse_not_finite, take_blocks
from ggtool.calibration.folds import find_folds, matrix
from ggtool.calibration.gptq import gptq_codes
from ggtool.calibration.moments import Moments, observed
from ggtool.calibration.rounding import pack, restore, round_weighted, spread, table
from ggtool.formats import Method
from ggtool.quantizers.linear import PackedMatrix
from ggtool.quantizers.matrices import Matrix, find_matrices, select
from ggtool.quantizers.packed import fill, install, pack_matrices
from ggtool.quantizers.pretrained import Device, match_tensors, move_buffers, refuse_quantized, skeleton
from ggtool.quantizers.selectors import ALL
from ggtool.quantizers.tables import TableQuantizer
from ggtool.system.progress import Progress


def calibrate_model(
    folder: Path,
    quantizer: TableQuantizer,
    method: Method,
    chunks: Tensor,
    device: Device,
    components: str = ALL,
    progress: Progress = lambda done, total: None,
) -> PreTrainedModel:
    """Return the model of `folder` packed by `method`, the matrices that `components` names, the rest float32.

    chunks: token ids (n_chunks, n_ctx). The token table and the output head are quantized without calibration. A
    layer's bias is corrected for the mean error of its outputs. progress: blocks done, of all.

    Raises SourceError as `ggtool.quantizers.packed.load_packed` does, and MeasureError when an activation is
    not finite.
    """
    refuse_quantized(folder)
    model = skeleton(folder)
    tensors = match_tensors(folder, model)
    names = block_names(model)
    inside: dict[str, list[Matrix]] = {name: [] for name in names}
    outside: list[Matrix] = []
    for one in select(find_matrices(model), components):
        owner = next((name for name in names if one.names[0].startswith(f"{name}.")), None)
        (outside if owner is None else inside[owner]).append(one)
    pack_matrices(model, outside, tensors, quantizer, device)
    held = take_blocks(tensors, names)
    fill(model, tensors, device)
    move_buffers(model, device)
    with torch.no_grad():
        blocks = Blocks(model, chunks.to(device))
        for index, name in enumerate(names):
            progress(index, len(names))
            fill(model, held[name], device)
            if inside[name]:
                _quantize_block(model, blocks, index, inside[name], quantizer, method)
            blocks.advance(index)
    progress(len(names), len(names))
    return model


def _quantize_block(
    model: PreTrainedModel,
    blocks: Blocks,
    index: int,
    matrices: Sequence[Matrix],
    quantizer: TableQuantizer,
    method: Method,
) -> None:
    """Replace `matrices`, all of one float block, by packed ones."""
    linears = {one.names[0]: one.modules[0] for one in matrices}
    with observed(linears) as (fed, forget):
        for _ in blocks.run(index):
            forget()
    for name, moments in fed.items():
        refuse_not_finite(name, is_finite=bool(moments.gram.isfinite().all()))
    if method == "awq":
        _fold_factors(model, blocks, index, linears, fed, quantizer)
    for one in matrices:
        linear, heard = (
            one.modules[0],
            fed.get(one.names[0]),
        )  # no statistics for a layer that no token reached
        weight = matrix(linear).contiguous()
        codes, scales = _round(quantizer, method, weight, None if heard is None else _cost(linear, heard))
        bias = linear.bias
        if isinstance(bias, Tensor) and heard is not None:
            bias += (weight - restore(quantizer, codes, scales)) @ heard.mean
        install(model, one, PackedMatrix(quantizer, pack(quantizer, codes, scales)))


def _cost(linear: nn.Module, moments: Moments) -> Tensor:
    """Return a layer's Hessian H: an error e in a row of its weight costs e H eᵀ."""
    return moments.gram if linear.bias is None else moments.covariance


def _round(
    quantizer: TableQuantizer, method: Method, weight: Tensor, hessian: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns) and scales (rows, groups) of a float32 `weight` (rows, columns)."""
    if hessian is None:
        return round_weighted(quantizer, weight)
    if method != "gptq":
        return round_weighted(quantizer, weight, hessian.diagonal())
    _, scales = round_weighted(quantizer, weight)
    wide = spread(quantizer, scales, weight.shape[1])
    return gptq_codes(weight, hessian, wide, table(quantizer, weight.device)), scales


def _fold_factors(
    model: PreTrainedModel,
    blocks: Blocks,
    index: int,
    linears: Mapping[str, nn.Module],
    fed: Mapping[str, Moments],
    quantizer: TableQuantizer,
) -> None:
    """Scale the input channels of each group of layers whose factors can be folded away; `fed` follows."""
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, moments in fed.items():
        groups.setdefault(id(moments), {})[name] = linears[name]
    for fold in find_folds(model, blocks.modules[index], [*groups.values()], lambda: next(blocks.run(index))):
        name, linear = next(iter(fold.consumers.items()))
        moments = fed[name]
        factors = search_factors(fold, _cost(linear, moments), moments.gram.diagonal(), quantizer)
        fold.apply(factors)
        moments.divide(factors[fold.channels])
