"""What each matrix of a model costs in each GGUF tensor type when it is rounded as `--method gptq` rounds it. Imported in a child only.

A matrix alone is rounded and the rest stays float. Rows are rounded independently, so the error of a type is taken on some of them. The KL
divergence of the model's predictions is measured with one type; that of the others is in proportion to their errors, as long as errors are small.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.blocks import Blocks, block_names
from ggtool.calibration.gguf_gptq.layer import Moments, Prepared
from ggtool.calibration.gguf_gptq.layers import Layer, find_layers, put
from ggtool.calibration.gguf_gptq.rounded import round_bytes
from ggtool.calibration.gguf_gptq.streams import Pair, judged_chunks
from ggtool.calibration.gguf_gptq.table import Table
from ggtool.calibration.predictions import Predictions
from ggtool.conversion.ggml import dequantize_rows
from ggtool.conversion.model import read_model
from ggtool.conversion.quantization_error import round_trip
from ggtool.errors import MeasureError
from ggtool.gguf.rounded_types import ROUNDED_TYPES
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import Device, match_tensors, refuse_quantized, skeleton
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import Progress

Floats = npt.NDArray[np.float32]
# Rows that the error of a type is taken on, spread evenly.
_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Asked:
    """What is to be found out.

    Attributes:
        types: the types that each tensor might have; the first is the one that divergence is measured with.
        importance: llama.cpp's importance of each input, float32 (n_matrices, n_per_row).

    """

    types: Mapping[str, Sequence[str]]
    importance: Mapping[str, Floats]
    threads: int

    def rounded(self, layer: Layer, type_name: str, rows: Floats, known: Prepared) -> Floats:
        """Return rows of a layer's matrix in a type: as `--method gptq` rounds them if it can, or else as llama.cpp does."""
        found = self.importance.get(layer.weight.name)
        importance = None if found is None else np.ascontiguousarray(found[0])
        if type_name not in ROUNDED_TYPES:
            return round_trip(type_name, rows, importance)
        data = round_bytes(type_name, rows, known.cost, importance, self.threads)
        return dequantize_rows(type_name, data, rows.shape[1])


def survey(
    source: ModelSource, asked: Asked, chunks: Tensor, device: Device, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return {tensor: {tensor type: expected divergence in nats}} of the tensors that are inputs of a product.

    chunks: token ids (n_chunks, n_ctx); some are kept apart, to measure on. Memory is taken for the float model. Raises MeasureError for predictions
    that are not finite.
    """
    refuse_quantized(source.folder)
    model = skeleton(source.folder)
    tensors = match_tensors(source.folder, model)
    layers = find_layers(model, tensors, read_model(source).tensors)
    layers = {name: layer for name, layer in layers.items() if layer.weight.name in asked.types}
    fill(model, tensors, device)
    model, chunks = model.to(device), chunks.to(device)
    apart = chunks[judged_chunks(len(chunks))]
    found = {}
    with torch.no_grad(), tempfile.TemporaryFile(prefix="ggtool-predictions-") as file:
        predictions = Predictions(model, apart, file)
        predictions.keep(Blocks(model, apart).rest(0))
        blocks, judged = Blocks(model, chunks), Blocks(model, apart)
        names = block_names(model)
        for index, name in enumerate(names):
            progress(index, len(names) + 1)
            inside = {
                key.removeprefix(f"{name}."): one for key, one in layers.items() if key.startswith(f"{name}.")
            }
            pair = Pair(blocks, blocks, index, blocks.modules[index])
            for stage in pair.stages([*inside]):
                moments = pair.moments(stage[0])
                moments.check(stage[0])
                for key in stage:
                    trial = _Trial(pair.module.get_submodule(key), inside[key], moments, 0.0, predictions)
                    found[inside[key].weight.name] = trial.costs(asked, partial(judged.rest, index))
            blocks.advance(index)
            judged.advance(index)
        progress(len(names), len(names) + 1)
        found.update(_head_costs(model, layers, asked, blocks, chunks, predictions))
    progress(len(names) + 1, len(names) + 1)
    return found


@dataclass(frozen=True)
class _Trial:
    """One layer whose matrix is rounded for a while, all else being float."""

    module: nn.Module
    layer: Layer
    moments: Moments
    table_share: float
    predictions: Predictions

    def costs(self, asked: Asked, states: Callable[[], Iterator[Tensor]]) -> dict[str, float]:
        """Return the expected divergence of each type; states: what comes out of the last block, for the chunks kept apart."""
        name, weight, bias = self.layer.weight.name, self.layer.weight, self.layer.bias
        rows = weight.rows(0, weight.n_rows)
        weight.source.release()
        known = self.moments.prepared(centred=bias is not None, table_share=self.table_share)
        places = np.linspace(0, len(rows) - 1, min(_SAMPLED_ROWS, len(rows))).astype(np.int64)
        some = np.ascontiguousarray(rows[places])
        errors = {}
        for kind in asked.types[name]:
            exact, changed = (
                torch.from_numpy(one).to(known.judged.hessian)
                for one in (some, asked.rounded(self.layer, kind, some, known))
            )
            errors[kind] = float(known.judged.errors(changed, exact).sum())
        measured = asked.types[name][0]
        kld = self._divergence(asked.rounded(self.layer, measured, rows, known), rows, known, states)
        if not math.isfinite(kld):
            raise MeasureError(f"{name} as {measured} makes predictions that are not finite.")
        return {kind: kld * error / (errors[measured] or 1.0) for kind, error in errors.items()}

    def _divergence(
        self, rounded: Floats, rows: Floats, known: Prepared, states: Callable[[], Iterator[Tensor]]
    ) -> float:
        bias = None if self.layer.bias is None else self.layer.bias.rows(0, 1)[0]
        mean = known.fitted.mean.cpu().numpy()
        shifted = None if bias is None else bias + (rows - rounded) @ mean
        put(self.module, self.layer, rounded, shifted)
        try:
            return self.predictions.divergence(states())
        finally:
            put(self.module, self.layer, rows, bias)


def _head_costs(
    model: PreTrainedModel,
    layers: Mapping[str, Layer],
    asked: Asked,
    blocks: Blocks,
    chunks: Tensor,
    predictions: Predictions,
) -> dict[str, dict[str, float]]:
    """Return the costs of the output matrix, behind all `blocks`; a tied one is the table of tokens too."""
    head = cast(nn.Module, model.get_output_embeddings())
    layer = next(
        (one for name, one in layers.items() if model.get_submodule(name).weight is head.weight), None
    )
    if layer is None:
        return {}
    moments = Pair(blocks, blocks, len(blocks.modules), model).last_moments(model, chunks)
    moments.check("the output matrix")
    apart = judged_chunks(len(chunks))

    def run(some: Tensor) -> Blocks:
        found = Blocks(model, some)
        for index in range(len(found.modules)):
            found.advance(index)
        return found

    name = layer.weight.name
    if head.weight is not model.get_input_embeddings().weight:
        trial = _Trial(head, layer, moments, 0.0, predictions)
        return {name: trial.costs(asked, lambda: blocks.states(apart))}
    rows = layer.weight.rows(0, layer.weight.n_rows)
    before = round_trip(asked.types[name][0], rows, None)
    share = Table(model, layer, blocks, blocks, chunks, run, rows, before).share()
    trial = _Trial(head, layer, moments, share, predictions)
    return {name: trial.costs(asked, lambda: Blocks(model, chunks[apart]).rest(0))}
