"""The name that llama.cpp has for a way of splitting text, from its definition in tokenizer.json.

Upstream's converter tells pre-tokenizers apart by hashing the ids of a probe text, which knows only the vocabularies
someone listed. What decides how a text is split is the definition, so that is what is looked up here: a vocabulary
of one's own is known if it splits like a known one. Regular expressions are as the checkpoints on the Hub spell them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.errors import SourceError

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+"
_BLANKS = r"\s+(?!\S)|\s+"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}|{_BLANKS}"
_REST_WITH_SLASH = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_BLANKS}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_RUNS_OF_BLANKS = "|".join([rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)])
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_KANA_AND_HAN = "[一-龥぀-ゟ゠-ヿ]+"
_NO_SENTENCE_MARKS = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_DIGIT = {"type": "Digits", "individual_digits": True}


def _words_by_case(suffix: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"


def _split(*steps: str | Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    splits = (
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        if isinstance(step, str)
        else step
        for step in steps
    )
    return (*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False})


_GPT2 = ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},)
_CL100K = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}{_REST}"
_O200K = rf"{_words_by_case(f'{_SUFFIXES}?')}|\p{{N}}{{1,3}}{_REST_WITH_SLASH}"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{_REST}"
_QWEN35 = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}|{_BLANKS}"
)
_TEKKEN = rf"{_words_by_case('')}|\p{{N}}{_REST_WITH_SLASH}"
_SEED = rf"{_SUFFIXES}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_BLANKS}"
_JAIS2 = (
    rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
    rf"|{_RUNS_OF_BLANKS}|\s{{1,2}}(?!\S)|\s{{1}}"
)
_EXAONE = (
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_LINES}|{_BLANKS}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How llama.cpp splits text under a name of its own.

    Attributes:
        name: what the GGUF says.
        ignores_merges: whether a word that is a token is taken whole, without merging.
        begins_texts: whether a text begins with BOS where the GGUF does not say.
        differs: where it splits unlike the definition in tokenizer.json, "" if nowhere.

    """

    name: str
    ignores_merges: bool = False
    begins_texts: bool = False
    differs: str = ""


_MARKS_AND_CASE = (
    "words with combining marks (Hindi, Bengali, Tamil, Thai, vowelled Arabic and Hebrew, and the like) and words with "
    "capitals inside that are not A to Z (Cyrillic, Greek, Armenian)"
)
_CASE = "words with capitals inside that are not A to Z (Cyrillic, Greek, Armenian)"

# The steps of a definition in tokenizer.json -> llama.cpp's names for them, the closest first. What they do is tested by
# ids, on texts in every script of Unicode; several more names of llama.cpp split unlike the tokenizers they are for.
PRE_TOKENIZERS: Mapping[str, tuple[PreTokenizer, ...]] = MappingProxyType(
    {
        json.dumps(steps, sort_keys=True): names
        for steps, names in (
            (_GPT2, (PreTokenizer("gpt-2"),)),
            ((_DIGIT, *_GPT2), (PreTokenizer("smollm"),)),
            (
                _split(_CL100K),
                (
                    PreTokenizer("dbrx"),
                    PreTokenizer("llama-bpe", ignores_merges=True, begins_texts=True),
                ),
            ),
            (
                _split(_O200K),
                (
                    PreTokenizer("granite-embed-multi-97m", ignores_merges=True, differs=_CASE),
                    PreTokenizer("gpt-4o", differs=_MARKS_AND_CASE),
                ),
            ),
            (_split(_QWEN2), (PreTokenizer("qwen2"),)),
            (_split(_QWEN35), (PreTokenizer("qwen35"),)),
            (
                _split(_TEKKEN),
                (PreTokenizer("tekken", ignores_merges=True, begins_texts=True, differs=_MARKS_AND_CASE),),
            ),
            (
                _split(r"\p{N}{1,3}", _KANA_AND_HAN, rf"{_PUNCTUATED}[\r\n]*|{_LINES}|{_BLANKS}"),
                (PreTokenizer("deepseek-v3"),),
            ),
            (_split(_NO_SENTENCE_MARKS), (PreTokenizer("bloom"),)),
            (_split(_NO_SENTENCE_MARKS, _DIGIT), (PreTokenizer("viking"),)),
            (_split(_SEED), (PreTokenizer("seed-coder"),)),
            (_split(_JAIS2), (PreTokenizer("jais-2"),)),
            (_split(_EXAONE), (PreTokenizer("exaone-moe"),)),
            (_split(rf"{_WORD}|\p{{N}}{_REST}"), (PreTokenizer("ufakzeka"),)),
            (_split(r"[^\n]+|[\n]+", _QWEN2), (PreTokenizer("laguna"),)),
            (
                _split(r"\p{N}{1,3}", rf"{_SUFFIXES}|{_WORD}|\p{{N}}+{_REST}"),
                (PreTokenizer("minicpm5", ignores_merges=True),),
            ),
        )
    }
)
# Other spellings of the same expression: none of what a possessive quantifier holds on to could be given back.
_SPELLINGS = (
    ("'(?i:[sdmt]|ll|ve|re)", _SUFFIXES),
    (r"]?+\p{L}", r"]?\p{L}"),
    (r"]++[\r\n]", r"]+[\r\n]"),
    (r"|\s*[\r\n]|\s+(?!", rf"|{_LINES}|\s+(?!"),
    (r"\p{N}{1}|", r"\p{N}|"),
    ("\r", r"\r"),
    ("\n", r"\n"),
)


def find_pre_tokenizer(tokenizer: TokenizerJson) -> PreTokenizer:
    """Return what llama.cpp has for a tokenizer's way of splitting; SourceError shows one that it has no name for."""
    definition, ignored = tokenizer.data.get("pre_tokenizer"), bool(tokenizer.model.get("ignore_merges"))
    names = PRE_TOKENIZERS.get(json.dumps([_plain(step) for step in _steps(definition)], sort_keys=True), ())
    if not names:
        raise SourceError(
            f"{tokenizer.path} splits text in a way that llama.cpp has no name for: {json.dumps(definition)[:200]}"
        )
    exact = [name for name in names if name.ignores_merges == ignored]
    if exact and exact[0].differs == names[0].differs:
        return exact[0]
    # Where every token is what its own text is merged into, it makes no difference whether it is taken without merging.
    unmerged = _unmerged(tokenizer)
    if not unmerged or exact:
        return names[0] if not unmerged else exact[0]
    taken = "takes words that are tokens without merging (ignore_merges)"
    raise SourceError(
        f"{tokenizer.path} {taken if ignored else 'merges every word'}, and llama.cpp, splitting like it, "
        f"{'merges every word' if ignored else taken}: {len(unmerged)} tokens such as {unmerged[0]!r} would differ."
    )


def _unmerged(tokenizer: TokenizerJson) -> list[str]:
    """List the tokens that their own text is not merged into."""
    from tokenizers.models import BPE

    try:
        model = BPE(dict(tokenizer.vocab), list(tokenizer.pairs()))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception
        raise SourceError(f"{tokenizer.path} cannot be read as a tokenizer: {error}") from None
    return [text for text in tokenizer.vocab if len(text) > 1 and len(model.tokenize(text)) != 1]


def _steps(definition: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a definition, without what only concerns offsets and with old omissions filled in."""
    if not isinstance(definition, dict):
        return
    if definition.get("type") == "Sequence":
        for part in definition.get("pretokenizers") or ():
            yield from _steps(part)
        return
    facts = {key: value for key, value in definition.items() if key != "trim_offsets"}
    if facts.get("type") == "ByteLevel":
        facts.setdefault("use_regex", True)
    yield facts


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step as the table spells it."""
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step.get("type") != "Split" or not isinstance(regex, str):
        return step
    for spelling, plain in _SPELLINGS:
        regex = regex.replace(spelling, plain)
    # An expression that ends so leaves nothing between its matches, so that what is removed is nothing.
    if step.get("behavior") == "Removed" and step.get("invert") is True and regex.endswith(r"|\s+"):
        step = {**step, "behavior": "Isolated", "invert": False}
    return {**step, "pattern": {"Regex": regex}}
