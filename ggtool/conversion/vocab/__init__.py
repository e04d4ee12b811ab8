"""A checkpoint's vocabulary as GGUF holds it; nothing is tokenized here and no tokenizer library is imported.

Two kinds: byte-level BPE, and SentencePiece's BPE. Which one a checkpoint has, its files tell. Upstream's converter
treats some families' vocabularies in their own ways, which `family` (a row's `vocabulary`) names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from ggtool.conversion.vocab import byte_level, sentencepiece
from ggtool.conversion.vocab.pre_tokenizers import BEGINS_TEXTS, pre_tokenizer_name
from ggtool.conversion.vocab.sentencepiece_proto import read_model_file
from ggtool.conversion.vocab.special_tokens import Special, read_added_tokens, read_special
from ggtool.conversion.vocab.tokens import seems_control
from ggtool.errors import SourceError
from ggtool.system.files import read_json

__all__ = ["Vocabulary", "pre_tokenizer_name", "read_vocabulary", "seems_control"]

# Ids that upstream gives CodeLlama, which it knows by the size of its vocabulary.
_CODE_LLAMA, _CODE_LLAMA_IDS = (
    32016,
    {
        Keys.Tokenizer.PREFIX_ID: 32007,
        Keys.Tokenizer.SUFFIX_ID: 32008,
        Keys.Tokenizer.MIDDLE_ID: 32009,
        Keys.Tokenizer.EOT_ID: 32010,
    },
)
# The vocabulary of SmolLM and of the small Granite models, whose files do not say that no BOS goes first.
_NO_BOS = 49152


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, scores or merges, ids of special tokens, which of them begin or end a text.

    model: "gpt2" for byte-level BPE, "llama" for SentencePiece. first, last: further keys, before and after.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    special_ids: Mapping[str, int]
    added: Mapping[str, bool]
    chat_template: str | Sequence[Mapping[str, str]] | None
    first: Mapping[str, int | bool] = field(default_factory=dict)
    last: Mapping[str, int | bool] = field(default_factory=dict)


def read_vocabulary(
    folder: Path, config: Mapping[str, Any], n_vocab: int, family: str = "plain"
) -> Vocabulary:
    """Read the tokenizer in `folder` for an embedding of `n_vocab` rows.

    Raises SourceError when there is none, it is of another kind, or it has ids beyond the embedding.
    """
    settings = _optional_json(folder / "tokenizer_config.json")
    data = _optional_json(folder / "tokenizer.json")
    model_file = folder / "tokenizer.model"
    takes_model_file = family in ("llama", "gemma") or (
        family == "phi3" and settings.get("tokenizer_class") != "GPT2Tokenizer"
    )
    if sentencepiece.falls_back_to_bytes(data) or (model_file.exists() and (takes_model_file or not data)):
        return _sentencepiece(folder, settings, config, data, n_vocab, family)
    return _byte_level(folder, settings, config, data, n_vocab, family)


def _byte_level(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    n_vocab: int,
    family: str,
) -> Vocabulary:
    if settings.get("add_prefix_space"):
        raise SourceError(
            f"{folder / 'tokenizer_config.json'} sets add_prefix_space, which a GGUF cannot say."
        )
    if data:
        files = byte_level.from_tokenizer_json(folder / "tokenizer.json", data)
    else:
        files = byte_level.from_vocab_json(folder, settings)
    special = read_special(folder, settings, config, files.added_tokens, data.get("post_processor"))
    tokens = files.tokens(n_vocab, special.ids.values())
    if files.pre in BEGINS_TEXTS:
        special.added.setdefault("bos", False)
    last = {}
    if family == "llama" and n_vocab == _NO_BOS and not special.added.get("bos"):
        last[Keys.Tokenizer.ADD_BOS] = False
    return Vocabulary(
        model="gpt2",
        pre=files.pre,
        tokens=tokens.texts,
        types=tokens.types,
        scores=[],
        merges=files.merges,
        special_ids=_within(special, n_vocab),
        added=special.added,
        chat_template=special.chat_template,
        first=_said_space_prefix(settings, family),
        last=last,
    )


def _sentencepiece(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    n_vocab: int,
    family: str,
) -> Vocabulary:
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if model_file.exists():
        tokens = sentencepiece.from_model_file(model_file, settings, n_vocab, by_looks=family != "phi3")
        prefixes = read_model_file(model_file).dummy_prefix
    else:
        tokens = sentencepiece.from_tokenizer_json(json_file, n_vocab)
    if data:
        prefixes = sentencepiece.prefixes_space(data)
    added_tokens = read_added_tokens(data, json_file)
    special = read_special(folder, settings, config, added_tokens, data.get("post_processor"))
    if data:
        special.added.setdefault("bos", False)  # llama.cpp's default for this kind is to begin a text with it
    first, last = _said_space_prefix(settings, family), {}
    if family == "gemma" or (not prefixes and not first):
        last[Keys.Tokenizer.ADD_PREFIX] = False
    if family == "llama" and n_vocab == _CODE_LLAMA:
        last.update(_CODE_LLAMA_IDS)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens.texts,
        types=tokens.types,
        scores=tokens.scores,
        merges=[],
        special_ids=_within(special, n_vocab),
        added=special.added,
        chat_template=special.chat_template,
        first=first,
        last=last,
    )


def _said_space_prefix(settings: Mapping[str, Any], family: str) -> dict[str, bool]:
    said = settings.get("add_prefix_space")
    return {Keys.Tokenizer.ADD_PREFIX: said} if family == "llama" and type(said) is bool else {}


def _within(special: Special, n_vocab: int) -> dict[str, int]:
    return {kind: number for kind, number in special.ids.items() if number < n_vocab}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
