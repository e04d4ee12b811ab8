"""The name that llama.cpp has for a pre-tokenizer, from its definition in tokenizer.json.

Upstream's converter tells pre-tokenizers apart by hashing the ids of a probe text, which knows only the vocabularies
someone listed. What decides how a text is split is the definition, so that is what is looked up here: a vocabulary
of one's own is known if it splits like a known one. Regular expressions are as the checkpoints on the Hub spell them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ggtool.errors import SourceError

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words_by_case(suffix: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"


def _split(regex: str) -> tuple[Mapping[str, Any], ...]:
    return (
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    )


_GPT2 = ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},)
_CL100K = _split(_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST)
_O200K = _split(_words_by_case(f"{_SUFFIXES}?") + r"|\p{N}{1,3}" + _REST_WITH_SLASH)
_QWEN2 = _split(_SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST)
_TEKKEN = _split(_words_by_case("") + r"|\p{N}" + _REST_WITH_SLASH)
_DIGITS = ({"type": "Digits", "individual_digits": True}, *_GPT2)


def _key(steps: Sequence[Mapping[str, Any]], *, ignore_merges: bool, normalized: bool) -> str:
    return json.dumps([list(steps), ignore_merges, normalized], sort_keys=True)


# Whole words of the vocabulary may be taken without merging (`ignore_merges`): llama.cpp knows that by the name too.
# The normalizer NFC changes nothing in text that is NFC already, and llama.cpp has none.
PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {
        _key(steps, ignore_merges=ignore_merges, normalized=normalized): name
        for steps, ignore_merges, normalized, name in (
            (_GPT2, False, False, "gpt-2"),
            (_GPT2, False, True, "olmo"),
            (_DIGITS, False, False, "smollm"),
            (_CL100K, False, False, "dbrx"),
            (_CL100K, True, False, "llama-bpe"),
            (_O200K, False, False, "gpt-4o"),
            (_QWEN2, False, True, "qwen2"),
            (_QWEN2, False, False, "qwen2"),
            (_TEKKEN, True, False, "tekken"),
        )
    }
)
# Where the GGUF does not say whether a text begins with BOS, these names say that it does.
BEGINS_TEXTS = frozenset({"llama-bpe", "tekken"})


def pre_tokenizer_name(
    definition: Any, where: str, *, ignore_merges: bool = False, normalizer: Any = None
) -> str:
    """Return llama.cpp's name for a tokenizer.json's `pre_tokenizer`; SourceError shows one it has no name for."""
    if normalizer and normalizer != {"type": "NFC"}:
        raise SourceError(
            f"{where} has a normalizer, which llama.cpp does not run: {json.dumps(normalizer)[:200]}"
        )
    steps = list(_steps(definition))
    name = PRE_TOKENIZERS.get(_key(steps, ignore_merges=ignore_merges, normalized=bool(normalizer)))
    if name is None:
        merges = " with ignore_merges" if ignore_merges else ""
        raise SourceError(
            f"{where} has a pre-tokenizer that ggtool does not know{merges}: {json.dumps(definition)[:200]}"
        )
    return name


def _steps(definition: Any) -> list[dict[str, Any]]:
    """List the steps of a definition, without what only concerns offsets and with old omissions filled in."""
    if not isinstance(definition, dict):
        return []
    if definition.get("type") == "Sequence":
        parts = definition.get("pretokenizers")
        return [step for part in parts for step in _steps(part)] if isinstance(parts, list) else []
    facts = {key: value for key, value in definition.items() if key != "trim_offsets"}
    if facts.get("type") == "ByteLevel":
        facts.setdefault("use_regex", True)
    return [facts]
