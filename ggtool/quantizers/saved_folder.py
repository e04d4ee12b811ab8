"""A model that ggtool quantized and saved: the facts in its config.json, read without torch.

The folder is laid out as a Hugging Face checkpoint: config.json (the original's, with a `quantization_config`
of `quant_method` "ggtool"), model.safetensors with codes and scales, and the original's tokenizer files. SCHEMA
names the meaning of what is stored; it is bumped when a meaning changes, and the reason goes here:
    1  first version
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggtool.errors import ArtifactError
from ggtool.formats import FORMATS, Format
from ggtool.source.safetensors import weight_files
from ggtool.system.files import content_sha256, read_json

SCHEMA = 1
QUANT_METHOD = "ggtool"
CONFIG_KEY = "quantization_config"
CONFIG_NAME = "config.json"
# Files that can hold a tokenizer's vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files copied from the original, so that the folder is self-contained.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class PackedFacts:
    """One quantized matrix: the modules that use it, the key of its quantizer in QUANTIZERS, (rows, columns)."""

    names: tuple[str, ...]
    quantizer: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class QuantizedFacts:
    """The facts that a saved model records.

    format, components: as typed after --backend. model, revision, source_sha256: the checkpoint it was made of, as
    `ggtool.source.resolve.ModelSource` has them. method: what decided the codes beside the weights,
    such as a calibration text; plain JSON values. versions: of what made it. matrices: in the model's order.
    """

    format: str
    components: str
    model: str
    revision: str
    source_sha256: str
    method: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    matrices: tuple[PackedFacts, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "schema": SCHEMA,
            "format": self.format,
            "components": self.components,
            "source": {"model": self.model, "revision": self.revision, "sha256": self.source_sha256},
            "method": dict(self.method),
            "versions": dict(self.versions),
            "matrices": [
                {"names": list(one.names), "quantizer": one.quantizer, "shape": list(one.shape)}
                for one in self.matrices
            ],
        }


def is_quantized_folder(folder: Path) -> bool:
    """Tell whether `folder` holds a model that ggtool quantized and saved, of whatever schema."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    stored = read_json(folder / CONFIG_NAME).get(CONFIG_KEY)
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


def read_facts(folder: Path) -> QuantizedFacts:
    """Return a saved model's facts; ArtifactError for another kind of folder, or a newer schema."""
    stored = read_json(folder / CONFIG_NAME).get(CONFIG_KEY)
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise ArtifactError(f"{folder} was not saved by `ggtool quantize`.")
    schema = stored.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(f"{folder / CONFIG_NAME} names no schema of its {CONFIG_KEY}; quantize again.")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{folder} was saved by a newer ggtool (schema {schema}, this one reads {SCHEMA}); update ggtool."
        )
    try:
        return _parse(stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"the {CONFIG_KEY} in {folder / CONFIG_NAME} is damaged ({error!r}); quantize again."
        ) from None


def folder_sha256(folder: Path) -> str:
    """Return one sha256 over weights and config of a saved model; reads every byte."""
    return content_sha256([*weight_files(folder), folder / CONFIG_NAME])


def _parse(stored: Mapping[str, Any]) -> QuantizedFacts:
    source = stored["source"]
    return QuantizedFacts(
        format=_text(stored["format"]),
        components=_text(stored["components"]),
        model=_text(source["model"]),
        revision=_text(source["revision"]),
        source_sha256=_text(source["sha256"]),
        method=dict(stored["method"]),
        versions={_text(name): _text(version) for name, version in stored["versions"].items()},
        matrices=tuple(_parse_matrix(one) for one in stored["matrices"]),
    )


def _parse_matrix(stored: Mapping[str, Any]) -> PackedFacts:
    rows, columns = (int(n) for n in stored["shape"])
    names = tuple(_text(name) for name in stored["names"])
    if not names:
        raise ValueError("a matrix without a name")
    return PackedFacts(names, _text(stored["quantizer"]), (rows, columns))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def saved_format(folder: Path) -> tuple[Format, QuantizedFacts]:
    """Return a saved model's format and facts; a format without a row in FORMATS gets one made up."""
    facts = read_facts(folder)
    known = FORMATS.get(facts.format)
    return known or Format(facts.format, "safetensors", "huggingface", facts.format, bits=0.0), facts
