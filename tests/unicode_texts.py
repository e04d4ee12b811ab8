"""Random strings in every script of Unicode, for whatever has to split, normalize or tokenize text.

A script is what a character's name begins with (DEVANAGARI LETTER KA), as Python's own tables have it: letters, marks and
digits of each come together as words, in small letters, capitals and camel case, between blanks, signs and line ends.
"""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from functools import cache

_SPACES = (
    *([" "] * 5),
    *("  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"),
)
_ENGLISH = (
    *("don't", "I'LL", "they'Ve", "it's", "'s", "''re", "CamelCase", "snake_case", "path/to", "HTTPServer"),
    *("x=[1,2];", "3.14", "a", "The"),
)
_SIGNS = (
    *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«—。，！€™▁🦙",
    *("...", "!?", "//", "/\n", ";\n\n", "👩\u200d🚀", "\u200d", "\ufeff"),
)
# Names that begin the same in more than one script: OLD ITALIC, OLD TURKIC.
_TWO_WORDS = {"OLD", "NEW", "LINEAR", "INSCRIPTIONAL", "IMPERIAL"}
_CONTROLS = ("\x00", "\x07", "\x1b", "\x7f", "\u200b", "\ufffd", "\ue000", "\U000f0000")


@cache
def scripts() -> dict[str, dict[str, list[str]]]:
    """Return script -> {"L", "M", "N": its characters}, of scripts with at least five letters."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number in range(0x80, 0x323B0):
        character = chr(number)
        kind = unicodedata.category(character)[0]
        if kind in "LMN":
            words = unicodedata.name(character, "").replace("-", " ").split()
            if words:
                found[" ".join(words[: 2 if words[0] in _TWO_WORDS else 1])][kind].append(character)
    found["ASCII"] = {
        "L": list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        "N": list("0123456789"),
        "M": [],
    }
    marks = found.pop("COMBINING")["M"]
    for script in ("LATIN", "GREEK", "CYRILLIC", "ASCII"):
        found[script]["M"] = found[script]["M"] + marks
    return {name: kinds for name, kinds in sorted(found.items()) if len(kinds["L"]) >= 5}


def make_text(random_: random.Random, script: str, n_words: int = 8) -> str:
    """Return some words in `script`, a few in English, and what stands between words."""
    parts = []
    for _ in range(random_.randint(1, n_words)):
        draw = random_.random()
        if draw < 0.6:
            parts.append(_word(random_, scripts()[script]))
        elif draw < 0.72:
            parts.append(random_.choice(_ENGLISH))
        elif draw < 0.8:
            parts.append("".join(random_.choices(scripts()["ASCII"]["N"], k=random_.randint(1, 8))))
        elif draw < 0.96:
            parts.append("".join(random_.choices(_SIGNS, k=random_.randint(1, 3))))
        else:
            parts.append(random_.choice(_CONTROLS))
        if random_.random() < 0.75:
            parts.append(random_.choice(_SPACES))
    return "".join(parts)


def _word(random_: random.Random, kinds: dict[str, list[str]]) -> str:
    # A few letters of a script and not all of it: words that share them are what merges are learned from.
    letters = random_.choices(
        kinds["L"][:60] if random_.random() < 0.7 else kinds["L"], k=random_.randint(1, 7)
    )
    if kinds["M"] and random_.random() < 0.5:
        letters = [
            part
            for letter in letters
            for part in (letter, random_.choice(kinds["M"]))[: random_.randint(1, 2)]
        ]
    if kinds["N"] and random_.random() < 0.15:
        letters += random_.choices(kinds["N"], k=random_.randint(1, 5))
    word = "".join(letters)
    shape = random_.random()
    if shape < 0.2:
        return word.title()
    if shape < 0.3:
        return word.upper()
    if shape < 0.45:
        return word.lower() + word.title()
    return word.lower() if shape < 0.7 else word
