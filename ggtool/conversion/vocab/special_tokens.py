"""Special tokens: their ids, which of them begin or end every text, and the chat template.

tokenizer.json's post-processor has the first word about what goes around a text, tokenizer_config.json the second,
as upstream's reader weighs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError
from ggtool.system.files import read_json

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything is merged."""

    id: int
    content: str
    special: bool


@dataclass(frozen=True)
class Special:
    """`ids` by kind ("bos"), `added` by kind: whether it goes around every text."""

    ids: Mapping[str, int]
    added: dict[str, bool]
    chat_template: str | Sequence[Mapping[str, str]] | None


def read_added_tokens(data: Mapping[str, Any], where: Path) -> list[AddedToken]:
    """Read the added tokens of a tokenizer.json."""
    try:
        return [
            AddedToken(int(entry["id"]), str(entry["content"]), bool(entry.get("special")))
            for entry in data.get("added_tokens") or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(f"{where} has damaged merges or added tokens.") from None


def read_special(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    added_tokens: Iterable[AddedToken],
    post_processor: Any,
) -> Special:
    """Read what tokenizer_config.json (`settings`), config.json and the post-processor say together."""
    known = dict(settings)
    where = str(folder / "tokenizer.json")
    added = _around(post_processor, known, where)
    for kind in _KINDS:
        if type(setting := settings.get(f"add_{kind}_token")) is bool:
            added.setdefault(kind, setting)
    return Special(_ids(known, config, added_tokens), added, _chat_template(folder, settings))


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


def _around(processor: Any, settings: dict[str, Any], where: str) -> dict[str, bool]:
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


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | Sequence[Mapping[str, str]] | None:
    template = settings.get("chat_template")
    path = folder / "chat_template.jinja"
    if template is None and path.exists():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from None
    elif template is None and (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
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
