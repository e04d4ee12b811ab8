"""A byte-level BPE vocabulary as GGUF holds it, from tokenizer.json or from vocab.json and merges.txt.

Nothing is tokenized here: upstream's converter tells pre-tokenizers apart by hashing the ids of a probe text,
which knows only vocabularies someone listed; here the definition in tokenizer.json decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf.constants import TokenType

from ggtool.checkpoint import read_json
from ggtool.errors import SourceError

# A pre-tokenizer's definition, offsets aside -> llama.cpp's name for it.
PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {'{"add_prefix_space": false, "type": "ByteLevel", "use_regex": true}': "gpt-2"}
)
_SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What some checkpoints list as ordinary added tokens though no text contains them.
_SEEMS_CONTROL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges by rank, ids of special tokens, which of them begin or end a text."""

    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special_ids: Mapping[str, int]
    added: Mapping[str, bool]
    chat_template: str | Sequence[Mapping[str, str]] | None


@dataclass(frozen=True)
class _AddedToken:
    id: int
    content: str
    special: bool


@dataclass(frozen=True)
class _Files:
    """The same facts out of either layout."""

    name: str
    vocab: Mapping[str, Any]
    merges: Sequence[str]
    added_tokens: Sequence[_AddedToken]
    pre: str
    post_processor: Mapping[str, Any] | None


def read_vocabulary(folder: Path, config: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """Read the tokenizer in `folder` for an embedding of `n_vocab` rows.

    Raises SourceError when there is none, it is of another kind, or it has ids beyond the embedding.
    """
    settings = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    )
    if settings.get("add_prefix_space"):
        raise SourceError(
            f"{folder / 'tokenizer_config.json'} sets add_prefix_space, which a GGUF cannot say."
        )
    files = (
        _from_tokenizer_json(folder)
        if (folder / "tokenizer.json").exists()
        else _from_vocab_json(folder, settings)
    )
    special_ids = _special_ids(settings, config, files.added_tokens)
    tokens, types = _tokens(files, n_vocab, special_ids)
    return Vocabulary(
        pre=files.pre,
        tokens=tokens,
        types=types,
        merges=files.merges,
        special_ids={kind: number for kind, number in special_ids.items() if number < n_vocab},
        added=_added(files, settings),
        chat_template=_chat_template(folder, settings),
    )


def pre_tokenizer_name(definition: Any, where: str) -> str:
    """Return llama.cpp's name for a tokenizer.json's `pre_tokenizer`; SourceError shows one it has no name for."""
    if isinstance(definition, dict):
        facts = (
            {"use_regex": True, **definition} if definition.get("type") == "ByteLevel" else dict(definition)
        )
        facts.pop("trim_offsets", None)
        name = PRE_TOKENIZERS.get(json.dumps(facts, sort_keys=True))
        if name:
            return name
    raise SourceError(
        f"{where} has a pre-tokenizer that ggtool does not know: {json.dumps(definition)[:200]}"
    )


def _from_tokenizer_json(folder: Path) -> _Files:
    path = folder / "tokenizer.json"
    data = read_json(path)
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise SourceError(
            f"{path} holds a tokenizer of type {kind}, and only byte-level BPE can be converted yet."
        )
    if affix := next(
        (key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)), None
    ):
        raise SourceError(f"{path} sets {affix}, which a GGUF cannot say.")
    if data.get("normalizer"):
        raise SourceError(
            f"{path} has a normalizer, which llama.cpp does not run: {json.dumps(data['normalizer'])[:200]}"
        )
    try:
        added = [
            _AddedToken(int(entry["id"]), str(entry["content"]), bool(entry.get("special")))
            for entry in data.get("added_tokens") or []
        ]
        merges = [_merge(entry) for entry in model.get("merges") or []]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(f"{path} has damaged merges or added tokens.") from None
    pre = pre_tokenizer_name(data.get("pre_tokenizer"), str(path))
    return _Files(str(path), model["vocab"], merges, added, pre, data.get("post_processor"))


def _from_vocab_json(folder: Path, settings: Mapping[str, Any]) -> _Files:
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise SourceError(
            f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt."
        )
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind != "GPT2Tokenizer":
        raise SourceError(f"{folder} has no tokenizer.json, and its {kind} cannot be read without one.")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'merges.txt'} cannot be read: {error}.") from None
    merges = [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    more = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    added = [_AddedToken(number, text, special=False) for text, number in more.items() if type(number) is int]
    return _Files(str(folder / "vocab.json"), read_json(folder / "vocab.json"), merges, added, "gpt-2", None)


def _merge(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    left, right = entry
    # The pair is stored with a space between, so a space inside is written as byte-level BPE writes it.
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"


def _tokens(files: _Files, n_vocab: int, special_ids: Mapping[str, int]) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(n_vocab)]
    types = [int(TokenType.UNUSED)] * n_vocab
    numbers = [*files.vocab.values(), *(token.id for token in files.added_tokens)]
    if bad := next((n for n in numbers if type(n) is not int or n < 0), None):
        raise SourceError(f"{files.name} has the token id {bad!r}.")
    if (last := max(numbers, default=-1)) >= n_vocab:
        raise SourceError(
            f"{files.name} has token ids up to {last}, and the model embeds only {n_vocab} tokens."
        )
    if len(set(files.vocab.values())) != len(files.vocab) or not files.merges:
        raise SourceError(f"{files.name} gives one id to two tokens, or has no merges.")
    for text, number in files.vocab.items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for token in files.added_tokens:
        control = token.special or seems_control(token.content)
        # llama.cpp matches user-defined tokens in raw text, where a SentencePiece space is a space.
        tokens[token.id] = token.content if control else token.content.replace("▁", " ")
        types[token.id] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    for number in special_ids.values():
        # Old GPT-2 tokenizers keep <|endoftext|> among the ordinary tokens; only the config tells.
        if number < n_vocab and types[number] == TokenType.NORMAL:
            types[number] = int(TokenType.CONTROL)
    return tokens, types


def seems_control(text: str) -> bool:
    """Whether an added token is a control token by its looks alone, as upstream's converter judges it."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _SEEMS_CONTROL or any(text.startswith(a) and text.endswith(b) for a, b in brackets)


def _special_ids(
    settings: Mapping[str, Any], config: Mapping[str, Any], added_tokens: Iterable[_AddedToken]
) -> dict[str, int]:
    by_text: dict[str, int] = {}
    for token in added_tokens:
        by_text.setdefault(token.content, token.id)
    found = {}
    for kind in _SPECIAL_KINDS:
        if (text := _text(settings.get(f"{kind}_token"))) in by_text:
            found[kind] = by_text[text]
    for kind in _SPECIAL_KINDS:
        number = config.get(f"{kind}_token_id")
        if type(number) is int and number >= 0:
            found.setdefault(kind, number)
    return found


def _text(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _added(files: _Files, settings: Mapping[str, Any]) -> dict[str, bool]:
    """Which special tokens go around every text: the post-processor's word, then tokenizer_config.json's."""
    found: dict[str, bool] = {}
    processor = files.post_processor
    if processor is not None and not isinstance(processor, dict):
        raise SourceError(f"{files.name} has a damaged post-processor.")
    for step in (processor.get("processors") or [processor]) if processor else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            found.setdefault("bos", False)
            found.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            found.update(_template(step, settings, files.name))
        else:
            raise SourceError(
                f"{files.name} has a post-processor that a GGUF cannot say: {json.dumps(step)[:200]}"
            )
    for kind in _SPECIAL_KINDS:
        if type(setting := settings.get(f"add_{kind}_token")) is bool:
            found.setdefault(kind, setting)
    return found


def _template(step: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, bool]:
    pieces = step.get("single") or []
    try:
        names = [piece.get("SpecialToken", {}).get("id") for piece in pieces]
    except (TypeError, AttributeError):
        raise SourceError(f"{where} has a damaged post-processor.") from None
    found = {}
    for kind, name in (("bos", names[0]), ("eos", names[-1])) if len(names) > 1 else ():
        if name is None:
            continue
        if (_text(settings.get(f"{kind}_token")) or name) != name:
            raise SourceError(f"{where} puts {name!r} around every text, which is not its {kind} token.")
        found[kind] = True
    return found


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | Sequence[Mapping[str, str]] | None:
    template = settings.get("chat_template")
    path = folder / "chat_template.jinja"
    if template is None and path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from None
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in template
    ):
        return template
    raise SourceError(f"{folder / 'tokenizer_config.json'} has a chat_template of an unknown kind.")
