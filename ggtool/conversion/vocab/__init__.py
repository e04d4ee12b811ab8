"""A checkpoint's vocabulary as GGUF holds it, and in which texts llama.cpp gives other ids than the checkpoint's tokenizer.

Two kinds: byte-level BPE, and SentencePiece's BPE. How text is split tells which one a checkpoint has. Upstream's
converter treats some families' vocabularies in their own ways, which `family` (a row's `vocabulary`) names.

The ids that count are those of the `tokenizers` library where there is a tokenizer.json, else those of transformers.
What llama.cpp cannot do is refused if it concerns any text, and becomes a note if it concerns few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from ggtool.conversion.vocab import byte_level, differences, sentencepiece, splitting
from ggtool.conversion.vocab import sentencepiece_proto as proto
from ggtool.conversion.vocab.pre_tokenizers import find_pre_tokenizer
from ggtool.conversion.vocab.special_tokens import (
    AddedToken,
    Special,
    read_added_tokens,
    read_json_if_there,
    read_named_tokens,
    read_special,
    with_named,
)
from ggtool.conversion.vocab.tokenizer_json import TokenizerJson, read_tokenizer_json
from ggtool.conversion.vocab.tokens import Tokens, check_vocab, seems_control
from ggtool.errors import SourceError

__all__ = [
    "NORMALIZER_KEY",
    "Vocabulary",
    "find_pre_tokenizer",
    "read_tokenizer_json",
    "read_vocabulary",
    "seems_control",
]

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


# The special tokens that transformers gives a tokenizer whose files name none, by its class.
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA_KINDS = ("bos", "eos", "unk", "pad", "mask")
_GEMMA_TOKENS = {f"{kind}_token": f"<{kind}>" for kind in _GEMMA_KINDS}
# The form of Unicode that the tokenizer brings a text to, for those who run the file; llama.cpp does not look for it.
NORMALIZER_KEY = "ggtool.tokenizer.normalizer"


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in GGUF's terms.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece.
        pre: how text is split, by llama.cpp's name.
        tokens, types: by id.
        scores: by id, for SentencePiece.
        merges: for byte-level BPE.
        special_ids: kind ("bos") -> id.
        added: kind -> whether it begins or ends every text.
        chat_template: see `Special`.
        first, last: further keys, before and after these.
        notes: where llama.cpp gives a text other ids than the checkpoint's tokenizer, a sentence for each reason.

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
    first: Mapping[str, int | bool | str] = field(default_factory=dict)
    last: Mapping[str, int | bool | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Checkpoint:
    folder: Path
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: TokenizerJson
    n_vocab: int
    family: str


def read_vocabulary(
    folder: Path, config: Mapping[str, Any], n_vocab: int, family: str = "plain"
) -> Vocabulary:
    """Read the tokenizer in `folder` for an embedding of `n_vocab` rows.

    Raises SourceError when there is none, it is of another kind, or it has ids beyond the embedding.
    """
    settings = read_json_if_there(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    has_pieces = (folder / "tokenizer.model").exists()
    if tokenizer.data:
        has_pieces = not splitting.is_byte_level(tokenizer)
    elif has_pieces:
        is_gemma = str(settings.get("tokenizer_class")).startswith("Gemma")
        settings = {**(_GEMMA_TOKENS if is_gemma else _LLAMA_TOKENS), **settings}
    checkpoint = _Checkpoint(folder, settings, config, tokenizer, n_vocab, family)
    return _sentencepiece(checkpoint) if has_pieces else _byte_level(checkpoint)


def _byte_level(checkpoint: _Checkpoint) -> Vocabulary:
    folder, settings, tokenizer = checkpoint.folder, checkpoint.settings, checkpoint.tokenizer
    n_vocab, family = checkpoint.n_vocab, checkpoint.family
    if settings.get("add_prefix_space"):
        raise SourceError(
            f"{folder / 'tokenizer_config.json'} sets add_prefix_space, which a GGUF cannot say."
        )
    form = splitting.unicode_form(tokenizer.data.get("normalizer"), tokenizer.path)
    if tokenizer.data:
        files = byte_level.from_tokenizer_json(tokenizer, settings, n_vocab)
    else:
        files = byte_level.from_vocab_json(folder, settings, n_vocab)
    special = read_special(folder, settings, checkpoint.config, files.added_tokens, tokenizer)
    tokens = files.tokens(n_vocab, special.ids.values())
    notes = tokens.make_distinct(files.name)
    if files.pre.begins_texts:
        special.added.setdefault("bos", False)
    last: dict[str, int | bool | str] = {}
    if family == "llama" and n_vocab == _NO_BOS and not special.added.get("bos"):
        last[Keys.Tokenizer.ADD_BOS] = False
    special_ids = _within(special, n_vocab)
    notes += differences.of_splitting(files.pre, form)
    notes += differences.of_bytes(files.vocab, files.unknown)
    notes += differences.of_added_tokens(
        files.added_tokens, tokens, tokenizer, words=files.pre.ignores_merges, form=form
    )
    notes += differences.of_names(tokens, special_ids, defaults={"eos": 11})
    if form:
        last[NORMALIZER_KEY] = form
    return Vocabulary(
        model="gpt2",
        # llama.cpp has a name of its own for GPT-2's way behind the normalizer NFC, and does the same under both.
        pre="olmo" if (files.pre.name, form) == ("gpt-2", "NFC") else files.pre.name,
        tokens=tokens.texts,
        types=tokens.types,
        scores=[],
        merges=files.merges,
        special_ids=special_ids,
        added=special.added,
        chat_template=special.chat_template,
        first=_said_space_prefix(settings, family),
        last=last,
        notes=tuple(notes),
    )


def _sentencepiece(checkpoint: _Checkpoint) -> Vocabulary:
    folder, settings, tokenizer = checkpoint.folder, checkpoint.settings, checkpoint.tokenizer
    n_vocab, family = checkpoint.n_vocab, checkpoint.family
    model_file = folder / "tokenizer.model"
    model = proto.read_model_file(model_file) if model_file.exists() else None
    way = (
        splitting.read_way(tokenizer)
        if tokenizer.data
        else splitting.way_of_model_file(model_file, model, settings)
    )
    tokens, added, notes = _pieces(checkpoint, model)
    notes += tokens.make_distinct(str(tokenizer.path if tokenizer.data else model_file))
    special = read_special(folder, settings, checkpoint.config, added, tokenizer)
    special.added.setdefault("bos", False)  # llama.cpp's default for this kind is to begin a text with it
    if not tokenizer.data and model is not None:
        notes += differences.of_model_file_alone(model, way, settings)
    first = _said_space_prefix(settings, family)
    last: dict[str, int | bool | str] = {}
    if way.prefixes != first.get(Keys.Tokenizer.ADD_PREFIX, True):
        first = {}
        last |= {} if way.prefixes else {Keys.Tokenizer.ADD_PREFIX: False}
    if family == "llama" and n_vocab == _CODE_LLAMA:
        last.update(_CODE_LLAMA_IDS)
    special_ids = _within(special, n_vocab)
    notes += differences.of_prefix(way, tokens)
    notes += differences.of_byte_pieces(tokens, tokenizer)
    notes += differences.of_added_tokens(added, tokens, tokenizer, prefixes=way.prefixes, form=way.form)
    notes += differences.of_names(tokens, special_ids, defaults={"eos": 2})
    if way.form:
        notes += differences.of_form(way.form)
        last[NORMALIZER_KEY] = way.form
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens.texts,
        types=tokens.types,
        scores=tokens.scores,
        merges=[],
        special_ids=special_ids,
        added=special.added,
        chat_template=special.chat_template,
        first=first,
        last=last,
        notes=tuple(notes),
    )


def _pieces(
    checkpoint: _Checkpoint, model: proto.SentencePieceModel | None
) -> tuple[Tokens, Sequence[AddedToken], list[str]]:
    """Return the tokens, those of them that were added, and notes.

    tokenizer.json decides, as it does for transformers. tokenizer.model has the scores, and is as good if it agrees.
    """
    tokenizer, n_vocab = checkpoint.tokenizer, checkpoint.n_vocab
    path = checkpoint.folder / "tokenizer.model"
    named = read_named_tokens(checkpoint.folder, checkpoint.settings)
    has_descriptions = checkpoint.settings.get("added_tokens_decoder") is not None
    described = {token.content for token in named if token.id >= 0} if has_descriptions else set()
    by_looks = checkpoint.family != "phi3"
    if not tokenizer.data:
        assert model is not None
        if model.model_type != proto.BPE:
            raise SourceError(f"{path} is not a BPE model; llama.cpp would split it differently.")
        vocab = {text: number for number, text in enumerate(model.texts)}
        added = with_named([], named, vocab, n_vocab)
        tokens = sentencepiece.from_model_file(path, model, added, described, n_vocab, by_looks=by_looks)
        return tokens, added, []
    check_vocab(tokenizer.vocab, str(tokenizer.path), n_vocab)
    added = with_named(read_added_tokens(tokenizer), named, tokenizer.vocab, n_vocab)
    merges = sentencepiece.read_merges(tokenizer)
    notes = differences.of_merges(merges, tokenizer)
    if model is not None and sentencepiece.agree(model, tokenizer, merges):
        tokens = sentencepiece.from_model_file(path, model, added, described, n_vocab, by_looks=by_looks)
        return tokens, added, notes
    if model is not None:
        notes.append(
            f"{path.name} is not the vocabulary of tokenizer.json, which transformers loads; left aside."
        )
    return sentencepiece.from_tokenizer_json(tokenizer, merges, added, n_vocab), added, notes


def _said_space_prefix(settings: Mapping[str, Any], family: str) -> dict[str, int | bool | str]:
    said = settings.get("add_prefix_space")
    return {Keys.Tokenizer.ADD_PREFIX: said} if family == "llama" and type(said) is bool else {}


def _within(special: Special, n_vocab: int) -> dict[str, int]:
    return {kind: number for kind, number in special.ids.items() if number < n_vocab}
