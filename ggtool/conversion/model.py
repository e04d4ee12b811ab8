"""A checkpoint as GGUF keys and tensors, before quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from gguf.gguf_writer import GGUFValue

from ggtool.conversion.architectures import (
    architecture_name,
    find_architecture,
    flatten,
    read_hparams,
    read_settings,
)
from ggtool.conversion.metadata import collect, vocabulary_keys
from ggtool.conversion.tensors import ModelTensor, model_tensors
from ggtool.conversion.vendored import FileProgress, convert_to_floats
from ggtool.conversion.vocab import read_vocabulary
from ggtool.source.resolve import ModelSource


@dataclass(frozen=True)
class Model:
    """Keys and tensors of a model, in the order they are written.

    Attributes:
        facts: every key but the vocabulary's.
        read_vocabulary: reads the vocabulary's keys and notes; it takes longer than all the rest.
        model_notes: warnings for the user about how llama.cpp runs the model.

    """

    facts: Mapping[str, GGUFValue]
    tensors: list[ModelTensor]
    read_vocabulary: Callable[[], tuple[Mapping[str, GGUFValue], tuple[str, ...]]]
    model_notes: tuple[str, ...] = ()

    @cached_property
    def values(self) -> Mapping[str, GGUFValue]:
        """Every key. Reads the vocabulary on first use; SourceError says what is wrong with it."""
        return {**self.facts, **self._vocabulary[0]}

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user; reads the vocabulary on first use."""
        return (*self.model_notes, *self._vocabulary[1])

    @cached_property
    def _vocabulary(self) -> tuple[Mapping[str, GGUFValue], tuple[str, ...]]:
        return self.read_vocabulary()


def read_model(
    source: ModelSource, progress: FileProgress | None = None, *, shapes_only: bool = False
) -> Model:
    """Read a checkpoint's config and tensor headers; SourceError says in one line what does not fit.

    An architecture without a row goes through llama.cpp's converter, which does read the weights, unless
    `shapes_only`; progress(done, total, "") then counts the bytes it has written.
    """
    row = find_architecture(source.config)
    if row is None:
        name = architecture_name(source.config)
        return Model(*convert_to_floats(source, name, progress, shapes_only=shapes_only), lambda: ({}, ()))
    settings = read_settings(row, source.config)
    hparams = read_hparams(row, settings)
    tensors = model_tensors(row, hparams, settings, source.weights)

    def keys() -> tuple[Mapping[str, GGUFValue], tuple[str, ...]]:
        vocabulary = read_vocabulary(
            source.folder, flatten(source.config), int(hparams["n_vocab"]), row.vocabulary
        )
        return vocabulary_keys(vocabulary), vocabulary.notes

    facts, unread = collect(source, row, hparams, tensors)
    return Model(facts, tensors, keys, (*row.notes(hparams, settings), *unread))
