"""A checkpoint as a GGUF sees it: every key and every tensor under its GGUF name, nothing quantized yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf.gguf_writer import GGUFValue

from ggtool.convert.architectures import (
    architecture_name,
    find_architecture,
    flatten,
    read_hparams,
)
from ggtool.convert.metadata import collect
from ggtool.convert.tensors import ModelTensor, model_tensors
from ggtool.convert.vendored import Progress, convert_to_floats
from ggtool.convert.vocab import read_vocabulary
from ggtool.source import ModelSource


@dataclass(frozen=True)
class Model:
    """Keys with their values in the order they are written, and tensors in theirs."""

    values: Mapping[str, GGUFValue]
    tensors: list[ModelTensor]


def read_model(source: ModelSource, progress: Progress | None = None, *, shapes_only: bool = False) -> Model:
    """Read all of a checkpoint but its weights; SourceError says in one line what does not fit.

    An architecture without a row goes through llama.cpp's converter, which does read the weights, unless
    `shapes_only`; progress(done, total, "") then counts the bytes it has written.
    """
    row = find_architecture(source.config)
    if row is None:
        name = architecture_name(source.config)
        return Model(*convert_to_floats(source, name, progress, shapes_only=shapes_only))
    config = flatten(source.config)
    hparams = read_hparams(row, config)
    tensors = model_tensors(row, hparams, config, source.weights)
    vocabulary = read_vocabulary(source.folder, config, int(hparams["n_vocab"]), row.vocabulary)
    return Model(collect(source, row, hparams, tensors, vocabulary), tensors)
