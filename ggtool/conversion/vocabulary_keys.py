"""A tokenizer's GGUF keys without its model: for an edit that replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf.gguf_writer import GGUFValue

from ggtool.conversion.architectures import ARCHITECTURES, flatten
from ggtool.conversion.metadata import vocabulary_keys
from ggtool.conversion.vocab import read_vocabulary
from ggtool.system.files import read_json


def read_vocabulary_keys(folder: Path, n_vocab: int, gguf_name: str) -> Mapping[str, GGUFValue]:
    """Return the keys of the tokenizer in `folder` for a model of the architecture `gguf_name` that embeds `n_vocab` tokens.

    Raises SourceError for a tokenizer that cannot be read, or that has more tokens.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    row = next((row for row in ARCHITECTURES.values() if row.gguf_name == gguf_name), None)
    family = row.vocabulary if row is not None else "plain"
    return vocabulary_keys(read_vocabulary(folder, flatten(config), n_vocab, family))
