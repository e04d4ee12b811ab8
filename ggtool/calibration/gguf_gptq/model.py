"""Round the matrices of a checkpoint in the order in which they run. Imported in a child only, since it imports torch.

Two streams of hidden states go through the model side by side, one through float blocks and one through blocks that are
rounded already. The layers of a block that share an input are rounded together, and what they become is what the next ones see. Memory holds
two copies of one block, the moments of one input and both streams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.blocks import Blocks, block_names, take_blocks
from ggtool.calibration.gguf_gptq.layer import Moments, Rounded, round_layer
from ggtool.calibration.gguf_gptq.layers import Layer, find_layers, put
from ggtool.calibration.gguf_gptq.stored import HEAD, read_step, step_path, write_step
from ggtool.calibration.gguf_gptq.streams import Pair
from ggtool.calibration.gguf_gptq.table import Table
from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.conversion.model import read_model
from ggtool.conversion.tensors import ModelTensor
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.model import FLOAT_TENSOR_TYPES
from ggtool.gguf.reader import read_header
from ggtool.gguf.rounded_types import ROUNDED_TYPES
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import (
    Device,
    match_tensors,
    move_buffers,
    refuse_quantized,
    skeleton,
)
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import Progress

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
        types: the tensor type of each tensor of the file.
        importance: llama.cpp's importance of each input, float32 (n_matrices, n_per_row).
        folder: where steps are kept.
        present: a file that is there and is to be refined; None to round anew.

    """

    types: Mapping[str, str]
    importance: Mapping[str, Floats]
    folder: Path
    threads: int
    present: Path | None = None

    def rounds(self, layer: Layer) -> bool:
        """Whether a layer's matrix is quantized at all."""
        return self.types[layer.weight.name] not in FLOAT_TENSOR_TYPES

    def bytes_before(self, weight: ModelTensor) -> npt.NDArray[np.uint8]:
        """Return a matrix as the file has it, or as llama.cpp rounds it."""
        if self.present is not None:
            return self.stored(weight.name)
        rows = weight.rows(0, weight.n_rows)
        return quantize_rows(self.types[weight.name], rows, self.importance_of(weight))

    def importance_of(self, weight: ModelTensor) -> Floats | None:
        """Return llama.cpp's importance of a matrix' inputs, float32 (n_per_row,), if there is one."""
        found = self.importance.get(weight.name)
        return None if found is None else np.ascontiguousarray(found[0])

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes in the file that is refined."""
        assert self.present is not None
        tensor = self._places[name]
        return np.fromfile(self.present, np.uint8, tensor.n_bytes, offset=tensor.offset)

    @cached_property
    def _places(self) -> Mapping[str, TensorInfo]:
        assert self.present is not None
        return {tensor.name: tensor for tensor in read_header(self.present).tensors}


def quantize_model(
    source: ModelSource, plan: Plan, chunks: Tensor, device: Device, progress: Progress
) -> None:
    """Round every matrix that `plan` gives a type of `ROUNDED_TYPES`; one file a step goes into its folder.

    chunks: token ids (n_chunks, n_ctx). Steps that are there are read and not made again. progress: steps done, of all.
    """
    refuse_quantized(source.folder)
    model = skeleton(source.folder)
    tensors = match_tensors(source.folder, model)
    layers = find_layers(model, tensors, read_model(source).tensors)
    names = block_names(model)
    held = take_blocks(tensors, names)
    fill(model, tensors, device)
    move_buffers(model, device)
    chunks = chunks.to(device)
    with torch.no_grad():
        floats = Blocks(model, chunks)
        _round_table(model, layers, plan)
        quantized = Blocks(model, chunks)
        for index, name in enumerate(names):
            progress(index, len(names) + 1)
            fill(model, held[name], device)
            original = copy.deepcopy(floats.modules[index])
            inside = _inside(name, layers, plan)
            _round_block(Pair(floats, quantized, index, original), inside, plan, f"{index:05}")
            floats.advance(index, original)
            quantized.advance(index)
            _empty(floats.modules[index])
        progress(len(names), len(names) + 1)

        def run(some: Tensor) -> Blocks:
            """Run chunks through the rounded blocks, which are read again one at a time."""
            blocks = Blocks(model, some)
            for index, name in enumerate(names):
                fill(model, held[name], device)
                stored = read_step(step_path(plan.folder, f"{index:05}"))
                assert stored is not None
                _restore_block(blocks.modules[index], _inside(name, layers, plan), stored[0], plan)
                blocks.advance(index)
                _empty(blocks.modules[index])
            return blocks

        _round_head(model, Pair(floats, quantized, len(names), model), chunks, layers, plan, run)
    progress(len(names) + 1, len(names) + 1)


def _inside(block: str, layers: Mapping[str, Layer], plan: Plan) -> dict[str, Layer]:
    """Return the layers of a block that are rounded, by their names in it."""
    return {
        key.removeprefix(f"{block}."): layer
        for key, layer in layers.items()
        if key.startswith(f"{block}.") and plan.rounds(layer)
    }


def _round_block(pair: Pair, layers: Mapping[str, Layer], plan: Plan, step: str) -> None:
    """Round the layers of one block in place, or take them from the step's file."""
    path = step_path(plan.folder, step)
    stored = read_step(path)
    if stored is not None:
        _restore_block(pair.module, layers, stored[0], plan)
        return
    tensors: dict[str, npt.NDArray[Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for names in pair.stages([*layers]):
        moments = pair.moments(names[0])
        moments.check(names[0])
        for name in names:
            layer, module = layers[name], pair.module.get_submodule(name)
            if plan.types[layer.weight.name] in ROUNDED_TYPES:
                rounded = _round(layer, moments, plan)
                _keep(layer, rounded, tensors, facts)
                put(module, layer, rounded.weights, rounded.bias)
            else:
                _restore(module, layer, {}, plan)
    write_step(path, tensors, facts)


def _round_head(
    model: PreTrainedModel,
    pair: Pair,
    chunks: Tensor,
    layers: Mapping[str, Layer],
    plan: Plan,
    run: Callable[[Tensor], Blocks],
) -> None:
    """Round the output matrix by what comes out of the last block; a tied one is the table of tokens too, see `Table`."""
    path = step_path(plan.folder, HEAD)
    head = model.get_output_embeddings()
    weight = cast(Tensor, head.weight)
    layer = next((one for name, one in layers.items() if model.get_submodule(name).weight is weight), None)
    if read_step(path) is not None:
        return
    tensors: dict[str, npt.NDArray[Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    if layer is not None and plan.types[layer.weight.name] in ROUNDED_TYPES:
        moments = pair.last_moments(model, chunks)
        moments.check("the output matrix")
        if weight is model.get_input_embeddings().weight:
            stock, exact = plan.bytes_before(layer.weight), layer.weight.rows(0, layer.weight.n_rows)
            before = dequantize_rows(plan.types[layer.weight.name], stock, layer.weight.n_per_row)
            table = Table(model, layer, pair.floats, pair.quantized, chunks, run, exact, before)
            rounded = table.checked(_round(layer, moments, plan, table.share()), stock)
        else:
            rounded = _round(layer, moments, plan)
        _keep(layer, rounded, tensors, facts)
    write_step(path, tensors, facts)


def _round(layer: Layer, moments: Moments, plan: Plan, table_share: float = 0.0) -> Rounded:
    weight, bias = layer.weight, layer.bias
    rows = weight.rows(0, weight.n_rows)
    weight.source.release()
    return round_layer(
        plan.types[weight.name],
        rows,
        None if bias is None else bias.rows(0, 1)[0],
        moments,
        plan.importance_of(weight),
        plan.threads,
        table_share,
        None if plan.present is None else plan.stored(weight.name),
    )


def _keep(
    layer: Layer,
    rounded: Rounded,
    tensors: dict[str, npt.NDArray[Any]],
    facts: dict[str, dict[str, Any]],
) -> None:
    tensors[layer.weight.name] = rounded.data
    if layer.bias is not None and rounded.bias is not None:
        tensors[layer.bias.name] = rounded.bias
    facts[layer.weight.name] = rounded.facts


def _restore(module: nn.Module, layer: Layer, stored: Mapping[str, npt.NDArray[Any]], plan: Plan) -> None:
    """Put a stored step's weights into a layer, or what was there before where there are none."""
    weight, type_name = layer.weight, plan.types[layer.weight.name]
    data = stored.get(weight.name)
    if data is None:
        data = plan.bytes_before(weight)
    bias = stored.get(layer.bias.name) if layer.bias is not None else None
    put(module, layer, dequantize_rows(type_name, data, weight.n_per_row), bias)


def _restore_block(
    block: nn.Module, layers: Mapping[str, Layer], stored: Mapping[str, npt.NDArray[Any]], plan: Plan
) -> None:
    for name, layer in layers.items():
        _restore(block.get_submodule(name), layer, stored, plan)


def _round_table(model: PreTrainedModel, layers: Mapping[str, Layer], plan: Plan) -> None:
    """Put llama.cpp's own rounding of the token table into the model, if the file has it rounded."""
    table = model.get_input_embeddings()
    for name, layer in layers.items():
        if model.get_submodule(name) is table and plan.rounds(layer):
            _restore(table, layer, {}, plan)


def _empty(block: nn.Module) -> None:
    """Give a block's memory back."""
    for module in block.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))
