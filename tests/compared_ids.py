"""A drawn tokenizer converted, and the token ids that llama.cpp gives texts with it against Hugging Face's.

A text with other ids is an error unless a note of the conversion is about it: each kind of note has a test here for the
texts that it explains.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drawn_vocabularies import Drawn
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from tokenizers import Tokenizer

from ggtool.backends.llama_cpp.vocab import open_vocabulary
from ggtool.conversion.metadata import vocabulary_keys
from ggtool.conversion.vocab import Vocabulary, read_vocabulary
from ggtool.corpus import load_tokenizer
from ggtool.errors import SourceError, UsageError
from ggtool.gguf.writer import encode, pack

NEWER = "a character that is newer than llama.cpp's tables of Unicode"


@dataclass
class Outcome:
    """What became of one tokenizer.

    Attributes:
        refused: why it was not converted.
        notes: what was noted at its conversion.
        same: how many texts have the same ids.
        explained: texts with other ids by the beginning of the note that says so.
        unspellable: how many texts `ggtool` refused as not to be spelled.
        silent: texts with other ids of which nothing was said: (text, whether special tokens were read, theirs, ours).

    """

    refused: str = ""
    notes: tuple[str, ...] = ()
    same: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    unspellable: int = 0
    silent: list[tuple[str, bool, list[int], list[int]]] = field(default_factory=list)


def compare(folder: Path, drawn: Drawn, texts: Iterable[str]) -> Outcome:
    """Convert the tokenizer in `folder` and compare the ids of `texts`, with special tokens read and as text."""
    path = folder / "tokenizer.json"
    try:
        theirs = load_tokenizer(path) if path.exists() else _by_transformers(folder)
    except SourceError as error:
        theirs, unreadable = None, str(error)
    try:
        vocabulary = read_vocabulary(folder, {}, drawn.n_vocab)
    except SourceError as error:
        return Outcome(refused=str(error).replace(str(folder), ""))
    if theirs is None:
        return Outcome(silent=[(f"converted, though it is no tokenizer: {unreadable}", False, [], [])])
    outcome = Outcome(notes=vocabulary.notes)
    gguf = folder / "vocabulary.gguf"
    write_vocabulary(vocabulary, gguf)
    with open_vocabulary(gguf) as ours:
        for text in texts:
            for reads_special in (True, False):
                theirs.encode_special_tokens = not reads_special
                wanted = theirs.encode(text).ids
                try:
                    found = ours.tokenize(text, add_special=True, parse_special=reads_special)
                except UsageError:
                    outcome.unspellable += 1
                    continue
                if max(wanted, default=0) >= drawn.n_vocab:
                    continue  # transformers adds a token of its class that no embedding has: no model could run on these ids
                if found == wanted:
                    outcome.same += 1
                elif reason := _reason(text, vocabulary, drawn, theirs):
                    outcome.explained[reason] += 1
                else:
                    outcome.silent.append((text, reads_special, wanted, found))
    return outcome


def write_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Write a GGUF file of a vocabulary and nothing else."""
    architecture = GGUFValue("llama", GGUFValueType.STRING)
    keys = {"general.architecture": architecture, **vocabulary_keys(vocabulary)}
    path.write_bytes(encode(pack(keys), ()))


def _by_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)._tokenizer
    except (OSError, ValueError) as error:
        raise SourceError(str(error)) from None


def _reason(text: str, vocabulary: Vocabulary, drawn: Drawn, theirs: Tokenizer) -> str:
    for beginning, explains in EXPLAINED.items():
        for note in vocabulary.notes:
            if re.match(beginning, note) and explains(text, note, drawn, theirs):
                return beginning
    if any(unicodedata.category(character) == "Cn" for character in text):
        return NEWER
    return ""


def _has_cased(text: str) -> bool:
    return any(ord(c) > 127 and (c.isupper() or c.islower() or c.istitle()) for c in text)


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(c)[0] == "M" for c in text)


def _tokens(drawn: Drawn, theirs: Tokenizer) -> dict[str, Any]:
    return {one.content: one for one in theirs.get_added_tokens_decoder().values()}


def _holds(flag: Callable[[Any], bool]) -> Callable[..., bool]:
    """Explain texts that hold an added token of a kind, also once they are normalized."""

    def explains(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
        return any(
            name in seen
            for name, one in _tokens(drawn, theirs).items()
            if flag(one)
            for seen in _shapes(text)
        )

    return explains


def _shapes(text: str) -> list[str]:
    forms = ("NFC", "NFD", "NFKC", "NFKD")
    shapes = [text, *(unicodedata.normalize(form, text) for form in forms)]  # type: ignore[arg-type]
    return [
        *shapes,
        *(shape.replace("▁", " ") for shape in shapes),
        *(shape.replace(" ", "▁") for shape in shapes),
    ]


def _names_in(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    """Explain texts that hold a token of the names that the note is about."""
    from ggtool.conversion.vocab.differences import _ALWAYS_READ, _CONTROL_NAMES, _END_NAMES

    return any(name in text for name in _ALWAYS_READ | _CONTROL_NAMES | _END_NAMES)


def _pair_in(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    return any(name in text for name in _tokens(drawn, theirs))


def _lacks_bytes(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    from ggtool.conversion.vocab.differences import _byte_texts

    vocab = drawn.data["model"]["vocab"] if drawn.data else {}
    missing = {byte for byte, shown in _byte_texts() if shown not in vocab}
    return bool(missing & set(text.encode()))


def _lacks_letters(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    vocab = drawn.data["model"]["vocab"] if drawn.data else {}
    return any(letter not in vocab for letter in text.replace(" ", "▁"))


def _begins_with_space(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    stretches = [text]
    for name in _tokens(drawn, theirs):
        stretches = [part for stretch in stretches for part in stretch.split(name)]
    return any(stretch[:1] in (" ", "▁") for stretch in stretches)


def _cut_in(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    return "\0" in text


def _always(text: str, note: str, drawn: Drawn, theirs: Tokenizer) -> bool:
    return True


# How a note begins -> whether it explains that a text has other ids.
EXPLAINED: dict[str, Callable[..., bool]] = {
    "llama.cpp splits words with combining marks": lambda text, *_: _has_marks(text) or _has_cased(text),
    "llama.cpp splits words with capitals": lambda text, *_: _has_cased(text),
    "the vocabulary lacks": _lacks_bytes,
    "a character without a token becomes": _lacks_letters,
    "llama.cpp puts a space in front of a text that begins with one": _begins_with_space,
    "llama.cpp puts a space in front of text behind a special token": _pair_in,
    "llama.cpp merges across words": lambda text, *_: " " in text or "▁" in text,
    "llama.cpp makes a token of any two": _always,
    "llama.cpp has one place in the order": _always,
    "the token .* strips white space": _holds(lambda one: one.lstrip or one.rstrip or one.single_word),
    "the token .* is matched in the normalized text": _holds(lambda one: one.normalized),
    "the token .* is matched in the raw text": _holds(lambda one: not one.content.isascii()),
    "the token .* looks like a control token": _holds(lambda one: not one.special),
    "the token .* is matched by llama.cpp even where": _holds(lambda one: one.special),
    "the token .* is always matched by llama.cpp": _names_in,
    "the token .* is not an added token": lambda text, *_: any(
        name in text for name in ("<unk>", "<s>", "</s>")
    ),
    "the token .* is not special here": _names_in,
    "the added tokens .* overlap": _pair_in,
    "llama.cpp holds no NUL": _cut_in,
}


def summary(refused: Counter[str], notes: Counter[str]) -> str:
    """Return the reasons by number, the commonest first."""
    rows = [f"  {count:6,}  {reason}" for reason, count in refused.most_common()]
    rows += [f"  {count:6,}  noted: {reason}" for reason, count in notes.most_common()]
    return "\n".join(rows)


def dumped(outcome: Outcome) -> str:
    """Return an outcome as JSON, for the process that asked for it."""
    return json.dumps({**outcome.__dict__, "explained": dict(outcome.explained)})
