"""Special tokens: their ids, which of them begin or end every text, and the chat template.

tokenizer.json's post-processor has the first word about what goes around a text, tokenizer_config.json the second,
as upstream's reader weighs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.errors import SourceError
from ggtool.source.chat_template import Templates, read_chat_template
from ggtool.system.files import read_json

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything is merged.

    Attributes:
        id: its number.
        content: its text.
        special: whether a text that spells it may be kept from becoming it.
        lstrip, rstrip: whether it takes the white space before and behind it.
        single_word: whether it is found between other word characters too.
        normalized: whether it is looked for in the normalized text.

    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Special:
    """`ids` by kind ("bos"), `added` by kind: whether it goes around every text."""

    ids: Mapping[str, int]
    added: dict[str, bool]
    chat_template: Templates


def read_added_tokens(tokenizer: TokenizerJson) -> list[AddedToken]:
    """Read the added tokens of a tokenizer.json, with the ids that the `tokenizers` library gives them.

    It goes by the order of the list: a token of the model has the model's id, any other the next one.
    """
    try:
        entries = [
            AddedToken(
                int(entry["id"]),
                str(entry["content"]),
                *(
                    bool(entry.get(flag))
                    for flag in ("special", "lstrip", "rstrip", "single_word", "normalized")
                ),
            )
            for entry in tokenizer.data.get("added_tokens") or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(f"{tokenizer.path} has damaged added tokens.") from None
    return number(entries, tokenizer.vocab)


def number(entries: Iterable[AddedToken], vocab: Mapping[str, int]) -> list[AddedToken]:
    """Return the tokens with the ids that they get one after another, beside those of `vocab`."""
    found: dict[str, AddedToken] = {}
    last = -1
    for entry in entries:
        if entry.content:
            known = vocab.get(entry.content, max(last + 1, len(vocab)))
            token = replace(entry, id=found[entry.content].id if entry.content in found else known)
            found[entry.content], last = token, max(last, token.id)
    return list(found.values())


def with_named(
    added: Sequence[AddedToken], named: Sequence[AddedToken], vocab: Mapping[str, int], n_vocab: int
) -> list[AddedToken]:
    """Return `added` and those of `named` that are not among them, numbered.

    A token that is only named, and gets an id for which the model of `n_vocab` tokens has no embedding, is left out.
    """
    known = {token.content for token in added}
    more = [token for token in named if token.content not in known]
    unlisted = {token.content for token in more if token.id < 0}
    found = number([*added, *more], vocab)
    return [token for token in found if token.id < n_vocab or token.content not in unlisted]


def read_named_tokens(
    folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, str] = MappingProxyType({})
) -> list[AddedToken]:
    """Read the tokens that tokenizer_config.json (`settings`) and older files name beside tokenizer.json.

    transformers adds them to the tokenizer when it loads it: those of `added_tokens_decoder`, or else of
    special_tokens_map.json and added_tokens.json, and the special ones by name, which have the id -1 here.
    `defaults`: special tokens by name that the tokenizer's class has where no file names one.
    """
    described = settings.get("added_tokens_decoder")
    named = {**defaults, **settings}
    listed: dict[int, AddedToken] = {}
    if described is None:
        named |= read_json_if_there(folder / "special_tokens_map.json")
    special = [_flags(entry) for entry in _special_entries(named)]
    try:
        if described is not None:
            for text, entry in described.items():
                listed[int(text)] = replace(_flags(entry), id=int(text), special=bool(entry.get("special")))
        else:
            texts = {token.content for token in special}
            for text, token_id in read_json_if_there(folder / "added_tokens.json").items():
                listed[token_id] = AddedToken(token_id, text, text in texts, normalized=text not in texts)
        in_order = [listed[token_id] for token_id in sorted(listed)]
        if in_order and in_order[0].id < 0:
            raise ValueError("a negative id")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(
            f"{folder / 'tokenizer_config.json'} has a damaged added_tokens_decoder."
            if described is not None
            else f"{folder / 'added_tokens.json'} is damaged: it gives a token no id."
        ) from None
    known = {token.content for token in in_order}
    return [*in_order, *(token for token in special if token.content not in known)]


def _special_entries(named: Mapping[str, Any]) -> Iterator[Any]:
    for kind in _KINDS:
        if _text(named.get(f"{kind}_token")):
            yield named[f"{kind}_token"]
    more = named.get("extra_special_tokens") or named.get("additional_special_tokens") or []
    yield from more.values() if isinstance(more, dict) else more if isinstance(more, list) else []


def _flags(entry: Any) -> AddedToken:
    facts = entry if isinstance(entry, dict) else {}
    flags = (bool(facts.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized"))
    return AddedToken(-1, _text(entry), True, *flags)


def read_special(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    added_tokens: Iterable[AddedToken],
    tokenizer: TokenizerJson,
) -> Special:
    """Read what tokenizer_config.json (`settings`), config.json and tokenizer.json say together."""
    known = dict(settings)
    added = _around(tokenizer, known)
    for kind in _KINDS:
        # Where there is a tokenizer.json, transformers lets it decide alone, and it says so by its post-processor.
        if type(setting := settings.get(f"add_{kind}_token")) is bool and not (setting and tokenizer.data):
            added.setdefault(kind, setting)
    return Special(_ids(known, config, added_tokens), added, read_chat_template(folder, settings))


def _ids(
    settings: Mapping[str, Any], config: Mapping[str, Any], added_tokens: Iterable[AddedToken]
) -> dict[str, int]:
    by_text: dict[str, int] = {}
    for token in added_tokens:
        by_text.setdefault(token.content, token.id)
    found = {}
    for kind in _KINDS:
        if (text := _text(settings.get(f"{kind}_token"))) in by_text:
            found[kind] = by_text[text]
    for kind in _KINDS:
        number = config.get(f"{kind}_token_id")
        if type(number) is int and number >= 0:
            found.setdefault(kind, number)
    return found


def _text(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _around(tokenizer: TokenizerJson, settings: dict[str, Any]) -> dict[str, bool]:
    processor, where = tokenizer.data.get("post_processor"), str(tokenizer.path)
    found: dict[str, bool] = {}
    if processor is not None and not isinstance(processor, dict):
        raise SourceError(f"{where} has a damaged post-processor.")
    for step in (processor.get("processors") or [processor]) if processor else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            found.setdefault("bos", False)
            found.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            found.update(_template(step, settings, where))
        else:
            raise SourceError(
                f"{where} has a post-processor that a GGUF cannot say: {json.dumps(step)[:200]}"
            )
    return found


def _template(step: Mapping[str, Any], settings: dict[str, Any], where: str) -> dict[str, bool]:
    single, pair = _pieces(step, "single", where), _pieces(step, "pair", where)
    found = {}
    first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
    if single.count(None) != 1 or len(single) != 1 + (first is not None) + (last is not None):
        raise SourceError(
            f"{where} puts more than one token before or behind every text, which a GGUF cannot say."
        )
    for kind, name in (("bos", first), ("eos", last)):
        if name is None:
            continue
        if (_text(settings.get(f"{kind}_token")) or name) != name:
            raise SourceError(f"{where} puts {name!r} around every text, which is not its {kind} token.")
        settings.setdefault(f"{kind}_token", name)
        found[kind] = True
    # What stands between the two texts of a pair, once what surrounds each of them is taken away.
    inner = pair[1 if first and pair[:1] == [first] else 0 : -1 if last and pair[-1:] == [last] else None]
    if len(inner) > 2 and inner[0] is None and inner[-1] is None:
        between = inner[1:-1]
        ends = {_text(settings.get("sep_token")), _text(settings.get("eos_token"))} - {""}
        found["sep"] = (between[0] in ends and not last) or (len(between) == 2 and between[1] in ends)
    return found


def _pieces(step: Mapping[str, Any], key: str, where: str) -> list[str | None]:
    """List the special tokens of a template in order, None in the place of a text."""
    try:
        return [piece.get("SpecialToken", {}).get("id") for piece in step.get(key) or []]
    except (TypeError, AttributeError):
        raise SourceError(f"{where} has a damaged post-processor.") from None


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Parse a JSON object; {} where there is no such file."""
    return read_json(path) if path.exists() else {}
