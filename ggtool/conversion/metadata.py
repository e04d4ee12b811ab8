"""GGUF key-value pairs, in the order and with the types of upstream's converter.

gguf-py names the keys, types the values and reads the authorship (README front matter, the parts of the model's
name, sampling defaults); this module selects which are written, and adds none that upstream would not write.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, Metadata, size_label
from gguf.constants import GGML_QUANT_VERSION, GGUFType, GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.conversion.architectures import Architecture
from ggtool.conversion.tensors import ModelTensor
from ggtool.conversion.vocab import Vocabulary
from ggtool.errors import SourceError
from ggtool.formats import Format
from ggtool.gguf.writer import pack
from ggtool.source.resolve import ModelSource
from ggtool.system.files import read_json

_CARD, _GENERATION = "README.md", "generation_config.json"


def collect(
    source: ModelSource,
    row: Architecture,
    hparams: Mapping[str, Any],
    tensors: Sequence[ModelTensor],
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return all keys of a file but the vocabulary's and the quant type, and notes for the user.

    The notes name what in README.md or generation_config.json could not be read and was left out.
    """
    writer = GGUFWriter(path=None, arch=row.gguf_name)
    writer.add_type(GGUFType.MODEL)
    notes = _authorship(source, tensors, writer)
    for name, hparam in row.hparams.items():
        if hparam.key and name in hparams:
            writer.add_key_value(hparam.key.format(arch=row.gguf_name), hparams[name], hparam.type)
    if Keys.General.FILE_TYPE not in writer.kv_data[0]:
        writer.add_file_type(0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    return dict(writer.kv_data[0]), notes


def format_keys(row: Format) -> dict[str, GGUFValue]:
    """Return general.file_type with the quant type's number; it replaces the 0 that `collect` wrote."""
    assert row.ftype is not None
    return {Keys.General.FILE_TYPE: GGUFValue(row.ftype, GGUFValueType.UINT32)}


def _authorship(source: ModelSource, tensors: Sequence[ModelTensor], writer: GGUFWriter) -> list[str]:
    for tensor in tensors:  # the writer counts the parameters for the size label
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 0)
    total, shared, expert, n_experts = writer.get_total_parameter_count()
    metadata, notes = _load(source, total)
    metadata.name = metadata.name or source.name
    if metadata.languages:  # YAML parses the language code `no` as false
        metadata.languages = ["no" if code is False else code for code in metadata.languages]
    metadata.size_label = metadata.size_label or size_label(total, shared, expert, n_experts)
    try:
        metadata.set_gguf_meta_model(writer)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        notes.append(
            f"{source.folder / _CARD} describes the model in a way that a GGUF cannot hold: {error!r}."
        )
    return [*notes, *_drop_impossible(writer.kv_data[0])]


def _drop_impossible(values: dict[str, GGUFValue]) -> list[str]:
    """Remove values that cannot be written, such as a temperature in words, and return a note on each."""
    notes = []
    for key in list(values):
        try:
            pack({key: values[key]})
        except SourceError as error:  # noqa: PERF203  # twenty keys at most
            notes.append(f"{key} is left out: {error}")
            del values[key]
    return notes


@contextmanager
def named_folder(source: ModelSource, without: Collection[str] = ()) -> Iterator[Path]:
    """Yield the checkpoint's folder under the model's name, without the files named in `without`.

    gguf-py takes the name from the folder, and the Hub's cache names folders by commit.
    """
    with tempfile.TemporaryDirectory(prefix="ggtool-") as folder:
        named = Path(folder) / source.name
        if without:
            named.mkdir()
            for file in source.folder.iterdir():
                if file.name not in without:
                    (named / file.name).symlink_to(file.resolve())
        else:
            named.symlink_to(source.folder.resolve(), target_is_directory=True)
        yield named


def _load(source: ModelSource, n_params: int) -> tuple[Metadata, list[str]]:
    notes: list[str] = []
    unreadable: tuple[str, ...] = ()
    for without in ((), (_CARD,), (_CARD, _GENERATION)):
        with named_folder(source, without) as named:
            try:
                metadata = Metadata.load(model_path=named, total_params=n_params)
                break
            except Exception as error:  # noqa: BLE001  # YAML of strangers fails in too many ways to list
                reason = " ".join(str(error).split())[:200]
                unreadable = (_CARD, _GENERATION)[len(without) : len(without) + 1]
                if not unreadable:
                    raise SourceError(f"{source.folder} cannot be described: {reason}") from None
                notes = [f"{source.folder / unreadable[0]} cannot be read and is left out: {reason}"]
    generation = source.folder / _GENERATION
    if metadata.sampling_penalty_repeat is None and generation.exists():
        # The pinned converter reads transformers' spelling too; gguf 0.19 does not yet.
        try:
            metadata.sampling_penalty_repeat = read_json(generation).get("repetition_penalty")
        except SourceError as error:
            notes = [f"{error} It is left out."]
    return metadata, notes


def vocabulary_keys(vocabulary: Vocabulary) -> dict[str, GGUFValue]:
    """Return the keys of a vocabulary; they are written after those of `collect`."""
    writer = GGUFWriter(path=None, arch="")
    writer.kv_data[0].clear()  # the architecture, which the writer puts first
    _further(vocabulary.first, writer)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.special_ids.items():
        if add_id := getattr(writer, f"add_{kind}_token_id", None):
            add_id(number)
    for kind, setting in vocabulary.added.items():
        if add_setting := getattr(writer, f"add_add_{kind}_token", None):
            add_setting(setting)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    if names := writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES):
        names.value.sort()  # gguf-py collects them in a set, whose order varies
    _further(vocabulary.last, writer)
    return dict(writer.kv_data[0])


def _further(values: Mapping[str, int | bool | str], writer: GGUFWriter) -> None:
    for key, value in values.items():
        kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, str: GGUFValueType.STRING}
        writer.add_key_value(key, value, kinds[type(value)])
