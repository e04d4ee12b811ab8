"""Notes on a vocabulary: in which texts llama.cpp gives other ids than the checkpoint's own tokenizer, and why.

Each function looks for one kind of reason and returns a sentence for each that it finds, naming a token where one is
concerned. llama.cpp's side is src/llama-vocab.cpp at the commit of vendor/llama.cpp/PIN.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from gguf.constants import TokenType

from ggtool.conversion.vocab.pre_tokenizers import PreTokenizer
from ggtool.conversion.vocab.sentencepiece import SPACE, Merges
from ggtool.conversion.vocab.sentencepiece_proto import SentencePieceModel
from ggtool.conversion.vocab.special_tokens import AddedToken
from ggtool.conversion.vocab.splitting import Form, SentencePieceWay
from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.conversion.vocab.tokens import Tokens

# Tokens that llama.cpp makes control tokens by their names, and those of them that end a generation.
# fmt: off
_END_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
    "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
    "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})
# fmt: on
# fmt: off
_CONTROL_NAMES = frozenset({
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",
    "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
})
# fmt: on
# Tokens that llama.cpp finds in any text by their names, even where special tokens are not to be read.
_ALWAYS_READ = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
# Bytes that no UTF-8 text has.
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}
_LONGEST_LOOKED_AT = 200
# What llama.cpp's ways of splitting leave whole: letters with a sign in front, digits, signs.
_ONE_WORD = re.compile(r"[^\w\s]?[^\W\d_]+|\d+|[^\w\s]+")


def of_splitting(pre: PreTokenizer, form: Form | None) -> list[str]:
    """Look at what llama.cpp's way of splitting lacks, and at the form of Unicode that it does not bring a text to."""
    notes = of_form(form) if form else []
    if pre.differs:
        notes.append(f"llama.cpp splits {pre.differs} unlike this tokenizer, and gives them other ids.")
    return notes


def of_form(form: Form) -> list[str]:
    """Look at the form of Unicode that the tokenizer brings a text to."""
    return [
        f"the tokenizer brings text to Unicode's form {form} first. llama.cpp does not: ggtool does it for chat and "
        "generate, and other programs must be given text in that form."
    ]


def of_bytes(vocab: Mapping[str, int], unknown: str) -> list[str]:
    """Look for bytes without a token, in a byte-level vocabulary."""
    missing = [byte for byte, text in _byte_texts() if byte not in _NEVER and text not in vocab]
    if not missing:
        return []
    theirs = f"{unknown} for them" if unknown else "the text closed up where they were"
    return [
        f"the vocabulary lacks {len(missing)} of the 243 bytes that a text may have, such as 0x{missing[0]:02X}: llama.cpp "
        f"leaves them out, and the tokenizer has {theirs}."
    ]


def of_byte_pieces(tokens: Tokens, tokenizer: TokenizerJson) -> list[str]:
    """Look for bytes without a token, in a SentencePiece vocabulary."""
    texts = set(tokens.texts)
    missing = [byte for byte in range(256) if byte not in _NEVER and f"<0x{byte:02X}>" not in texts]
    notes = []
    if missing:
        notes.append(
            f"the vocabulary has no token for the byte 0x{missing[0]:02X}"
            + (f" nor for {len(missing) - 1} others" if missing[1:] else "")
            + ", so llama.cpp cannot tokenize a character that has no token: chat and generate refuse such a text, and "
            "other programs may crash."
        )
    has_bytes = len(missing) < 256 - len(_NEVER)
    if has_bytes and tokenizer.data and not tokenizer.model.get("byte_fallback"):
        notes.append(
            "a character without a token becomes the unknown token in the tokenizer, and its bytes in llama.cpp."
        )
    return notes


def of_prefix(way: SentencePieceWay, tokens: Tokens) -> list[str]:
    """Look at where a space is put in front of a text, and whether words are merged one by one."""
    notes = []
    if way.prefix in ("always", "first"):
        notes.append(
            "llama.cpp puts a space in front of a text that begins with one, and the tokenizer does not."
        )
    if way.prefix == "first":
        notes.append(
            "llama.cpp puts a space in front of text behind a special token, and the tokenizer only in front of the whole."
        )
    if way.splits_words and (joined := [text for text in _normal(tokens) if SPACE in text[1:]]):
        notes.append(
            f"llama.cpp merges across words into tokens such as {joined[0]!r}, and the tokenizer takes word by word."
        )
    return notes


def of_model_file_alone(
    model: SentencePieceModel, way: SentencePieceWay, settings: Mapping[str, Any]
) -> list[str]:
    """Look at where transformers reads a tokenizer.model unlike the program that made it; the file follows transformers."""
    notes = []
    if model.dummy_prefix != way.prefixes:
        wants = "a space in front of a text" if model.dummy_prefix else "no space in front of a text"
        notes.append(
            f"tokenizer.model asks for {wants}, and transformers reads it otherwise, which is what the file has: see "
            "tokenizer_class and add_prefix_space in tokenizer_config.json, or save the tokenizer with transformers once."
        )
    if type(settings.get("add_bos_token")) is not bool:
        notes.append(
            "no file says whether a text begins with BOS (add_bos_token); transformers then begins with none, and so does the "
            "file. --metadata tokenizer.ggml.add_bos_token=true has it."
        )
    return notes


def of_merges(merges: Merges, tokenizer: TokenizerJson) -> list[str]:
    """Look for tokens that llama.cpp would make of two others though the tokenizer does not."""
    notes = []
    if merges.unlisted is not None:
        left, right = merges.unlisted
        notes.append(
            f"llama.cpp makes a token of any two that spell it, such as {left!r} and {right!r}: {merges.n_possible:,} "
            f"merges, of which {tokenizer.path.name} lists {merges.n_distinct:,}. Some words get other ids."
        )
    if not merges.are_grouped:
        notes.append(
            "llama.cpp has one place in the order of merges for each token, and the tokenizer has one for each merge. Some "
            "words get other ids."
        )
    return notes


def of_added_tokens(
    added: Sequence[AddedToken],
    tokens: Tokens,
    tokenizer: TokenizerJson,
    *,
    words: bool = False,
    prefixes: bool = False,
    form: Form | None = None,
) -> list[str]:
    """Look at how added tokens are found in a text.

    `words`: whether llama.cpp takes a word that is a token without merging. `prefixes`: whether a space is put in front
    of a text. `form`: see `of_form`.
    """
    kept = [token for token in added if token.id < len(tokens.texts)]
    notes = [
        *_such_as(
            (token.content for token in kept if token.lstrip or token.rstrip or token.single_word),
            "strips white space around it or matches whole words only (lstrip, rstrip, single_word), which llama.cpp ignores",
        ),
        *_such_as(
            (
                token.content
                for token in kept
                if token.normalized
                and (prefixes or (form and not unicodedata.is_normalized(form, token.content)))
            ),
            "is matched in the normalized text, and by llama.cpp in the raw text",
        ),
        *_such_as(
            (
                token.content
                for token in kept
                if form and not token.normalized and not token.content.isascii()
            ),
            "is matched in the raw text, and by ggtool also in text that becomes it when it is normalized",
        ),
        *_such_as(
            (
                token.content
                for token in kept
                if not token.special and tokens.types[token.id] == TokenType.CONTROL
            ),
            "looks like a control token and is written as one, so llama.cpp does not match it unless special tokens are parsed",
        ),
    ]
    if tokenizer.data:
        contents = {token.content for token in kept}
        unlisted = (
            text
            for text, kind in zip(tokens.texts, tokens.types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN) and text not in contents
        )
        notes += _such_as(
            unlisted,
            "is not an added token in tokenizer.json, but llama.cpp matches it where special tokens are parsed",
        )
    listed = {
        str(entry.get("content")): entry.get("id") for entry in tokenizer.data.get("added_tokens") or []
    }
    if moved := [token for token in kept if listed.get(token.content, token.id) != token.id]:
        notes.append(
            f"{tokenizer.path.name} lists the added token {moved[0].content!r} as {listed[moved[0].content]}, and the "
            f"tokenizers library makes it {moved[0].id}, which is what the file has."
        )
    controls = [token.content for token in kept if tokens.types[token.id] == TokenType.CONTROL]
    outside = [text for text in controls if text not in tokenizer.vocab]
    joined = tokens.scores and any(tokens.scores)
    spelled = (
        text
        for text in outside
        if (words and _ONE_WORD.fullmatch(text)) or (joined and _is_joined(text, tokenizer.vocab))
    )
    notes += _such_as(
        spelled,
        "is matched by llama.cpp even where special tokens are not parsed, like any other word",
    )
    if pair := next(_overlaps([(token.content, token.special) for token in kept]), None):
        notes.append(
            f"the added tokens {pair[0]!r} and {pair[1]!r} overlap, and llama.cpp takes the longest first where the "
            "tokenizer takes the one that begins first."
        )
    return notes


def of_names(tokens: Tokens, special_ids: Mapping[str, int], defaults: Mapping[str, int]) -> list[str]:
    """Look for tokens that llama.cpp treats by their names, and for ids that it takes for granted (`defaults`)."""
    notes = []
    plain = [
        text
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
        if kind != TokenType.CONTROL and (text in _END_NAMES or text in _CONTROL_NAMES)
    ]
    ends = [text for text in plain if text in _END_NAMES]
    notes += _such_as(
        ends,
        "is not special here, but llama.cpp ends a generation at it and does not match it in text, because of its name",
    )
    notes += _such_as(
        (text for text in plain if text not in _END_NAMES),
        "is not special here, but llama.cpp does not match it in text, because of its name",
    )
    controls = (
        text
        for text, kind in zip(tokens.texts, tokens.types, strict=True)
        if kind == TokenType.CONTROL and text in _ALWAYS_READ
    )
    notes += _such_as(controls, "is always matched by llama.cpp, even where special tokens are not parsed")
    for kind, number in defaults.items():
        if kind not in special_ids and number < len(tokens.texts):
            notes.append(
                f"the checkpoint names no {kind} token, and llama.cpp then takes {number} for it, which is "
                f"{tokens.texts[number]!r}: a generation ends there. --metadata tokenizer.ggml.{kind}_token_id=N names one."
            )
    return notes


def _such_as(texts: Iterable[str], what: str) -> list[str]:
    found = list(texts)
    if not found:
        return []
    others = f" (and {len(found) - 1:,} more)" if found[1:] else ""
    return [f"the token {found[0]!r}{others} {what}."]


def _normal(tokens: Tokens) -> Iterator[str]:
    return (text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind == TokenType.NORMAL)


def _is_joined(text: str, vocab: Mapping[str, int]) -> bool:
    """Tell whether llama.cpp makes `text` of two parts: tokens, or single characters, which it begins with."""
    splits = ((text[:at], text[at:]) for at in range(1, len(text)))
    return len(text) == 1 or any(all(len(part) == 1 or part in vocab for part in split) for split in splits)


def _overlaps(added: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, str]]:
    """Yield pairs of added tokens (text, whether special) that the two programs find otherwise in some text."""
    short = [(text, special) for text, special in added if len(text) <= _LONGEST_LOOKED_AT]
    beginnings: dict[str, list[tuple[str, bool]]] = {}
    for text, special in short:
        for at in range(1, len(text)):
            beginnings.setdefault(text[:at], []).append((text, special))
    for text, special in short:
        for at in range(1, len(text)):
            # More than a few tokens that begin alike are runs of one character, in which none hides another.
            for other, other_special in islice(beginnings.get(text[at:], ()), 40):
                both = [(text, special), (other, other_special)]
                if _differ(text + other[len(text) - at :], both):
                    yield text, other
    plain = {text for text, special in short if not special}
    for text, special in short:
        if special:
            inside = (text[a:b] for a in range(len(text)) for b in range(a + 1, len(text) + 1))
            if found := next((part for part in inside if part in plain), None):
                yield text, found


def _differ(text: str, added: Sequence[tuple[str, bool]]) -> bool:
    for reads_special in (True, False):
        found = [token for token, special in added if reads_special or not special]
        if _first_begun(text, [token for token, _ in added], found) != _longest_first(text, found):
            return True
    return False


def _first_begun(text: str, added: Sequence[str], read: Sequence[str]) -> list[tuple[int, str]]:
    """List (place, token) as the tokenizers library finds them: what begins first, of these the longest."""
    places, at = [], 0
    while at < len(text):
        match = max((token for token in added if text.startswith(token, at)), key=len, default="")
        if match in read:
            places.append((at, match))
        at += len(match) or 1
    return places


def _longest_first(text: str, read: Sequence[str]) -> list[tuple[int, str]]:
    """List (place, token) as llama.cpp finds them: all of the longest, then of the next."""
    free, places = [(0, text)], []
    for token in sorted(read, key=lambda token: -len(token.encode())):
        rest = []
        for start, part in free:
            while (at := part.find(token)) >= 0:
                places.append((start + at, token))
                rest.append((start, part[:at]))
                start, part = start + at + len(token), part[at + len(token) :]
            rest.append((start, part))
        free = rest
    return sorted(places)


def _byte_texts() -> Iterator[tuple[int, str]]:
    """Yield each byte with the character that byte-level BPE writes for it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 0
    for byte in range(256):
        if byte in shown:
            yield byte, chr(byte)
        else:
            yield byte, chr(0x100 + hidden)
            hidden += 1
