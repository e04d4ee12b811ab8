"""How a tokenizer.json or tokenizer.model takes a text apart before it merges anything, as far as llama.cpp can follow.

Byte-level BPE and SentencePiece's BPE are told apart by this: the one writes every byte as a character of its own, the
other writes spaces as ▁ and has tokens <0x00> to <0xFF> for what is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ggtool.conversion.vocab.sentencepiece import SPACE
from ggtool.conversion.vocab.sentencepiece_proto import SentencePieceModel
from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.errors import SourceError

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
Prefix = Literal["never", "always", "first", "each"]


@dataclass(frozen=True)
class SentencePieceWay:
    """What happens to a text before SentencePiece's merges.

    Attributes:
        prefix: where a space is put in front: "each" stretch of text between two added tokens, as llama.cpp does it;
            "always" there, and "first" at the beginning of a text, unless a space is there already.
        splits_words: whether nothing is merged across the beginning of a word.
        form: the form of Unicode that a text is brought to, if any.

    """

    prefix: Prefix
    splits_words: bool = False
    form: Form | None = None

    @property
    def prefixes(self) -> bool:
        """Whether a space is put in front of a text."""
        return self.prefix != "never"


def is_byte_level(tokenizer: TokenizerJson) -> bool:
    """Tell byte-level BPE from SentencePiece's; SourceError for a tokenizer that is neither."""
    path, kind = tokenizer.path, tokenizer.model.get("type", "BPE" if tokenizer.vocab else None)
    if kind != "BPE":
        raise SourceError(f"{path} holds a tokenizer of type {kind}, and only BPE can be converted.")
    if not tokenizer.vocab:
        raise SourceError(f"{path} has no vocabulary.")
    steps = [*_steps(tokenizer.data.get("pre_tokenizer"))]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return True
    if _escapes_spaces([*_steps(tokenizer.data.get("normalizer")), *steps]):
        return False
    raise SourceError(
        f"{path} splits text neither into bytes (ByteLevel) nor with {SPACE} for a space (Metaspace), and llama.cpp has "
        f"no other BPE: {json.dumps(tokenizer.data.get('pre_tokenizer'))[:200]}"
    )


def unicode_form(normalizer: Any, path: Path) -> Form | None:
    """Return the form of Unicode that a normalizer brings a text to; SourceError for one that does more."""
    forms = {step.get("type") for step in _steps(normalizer)}
    if not forms:
        return None
    form: Form | None = next((form for form in get_args(Form) if forms == {form}), None)
    if form is None:
        raise SourceError(
            f"{path} has a normalizer, which llama.cpp does not run: {json.dumps(normalizer)[:200]}"
        )
    return form


def read_way(tokenizer: TokenizerJson) -> SentencePieceWay:
    """Return how a tokenizer.json of SentencePiece's kind begins; SourceError shows a step that llama.cpp lacks."""
    path, prefix, splits_words = tokenizer.path, "never", False
    forms: list[Mapping[str, Any]] = []
    escaped = False
    for step in _steps(tokenizer.data.get("normalizer")):
        if step == {"type": "Prepend", "prepend": SPACE} and not forms:
            prefix = "each"
        elif _is_escape(step):
            escaped = True
        elif step.get("type") in ("NFC", "NFD") or (step.get("type") in ("NFKC", "NFKD") and not escaped):
            forms.append(step)
        else:
            raise SourceError(
                f"{path} has a normalizer, which llama.cpp does not run: {json.dumps(step)[:200]}"
            )
    form = unicode_form({"type": "Sequence", "normalizers": forms}, path)
    for step in _steps(tokenizer.data.get("pre_tokenizer")):
        if step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            escaped = True
            scheme = step.get(
                "prepend_scheme", "never" if step.get("add_prefix_space") is False else "always"
            )
            if prefix == "never":
                prefix = scheme
            splits_words = splits_words or bool(step.get("split", True))
        elif not (escaped and step.get("type") == "Split" and step.get("pattern") == {"String": " "}):
            raise SourceError(
                f"{path} splits text in a way that llama.cpp has no name for: {json.dumps(step)[:200]}"
            )
    return SentencePieceWay(prefix, splits_words, form)  # type: ignore[arg-type]  # as the library spells them


def way_of_model_file(
    path: Path, model: SentencePieceModel | None, settings: Mapping[str, Any]
) -> SentencePieceWay:
    """Return how a tokenizer.model begins; SourceError for rules that llama.cpp does not run.

    `settings` are those of tokenizer_config.json.
    """
    assert model is not None
    if model.normalization:
        raise SourceError(
            f"{path} rewrites text by {model.normalization} before it splits it, which llama.cpp does not."
        )
    if model.removes_blanks:
        raise SourceError(f"{path} takes surplus blanks out of a text, which llama.cpp does not.")
    # So transformers 5 reads it, whatever the model file says: LlamaTokenizer puts a space in front of a text unless it is told
    # otherwise, and no other class does.
    is_llama = str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    return SentencePieceWay("first" if is_llama and settings.get("add_prefix_space", True) else "never")


def _escapes_spaces(steps: list[Mapping[str, Any]]) -> bool:
    return any(step.get("type") == "Metaspace" or _is_escape(step) for step in steps)


def _is_escape(step: Mapping[str, Any]) -> bool:
    return step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _steps(definition: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, however nested; an empty sequence has none."""
    if not isinstance(definition, dict):
        return
    if definition.get("type") == "Sequence":
        for part in definition.get("normalizers") or definition.get("pretokenizers") or ():
            yield from _steps(part)
    else:
        yield definition
