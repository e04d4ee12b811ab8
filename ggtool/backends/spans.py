"""A text cut at the names of control tokens, and a part of a text tokenized as the part that it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Nothing is merged with this code point, which Unicode will never assign.
_WALL = "\ufdd2"
_BLANKS = " \t\n\v\f\r"


@dataclass(frozen=True)
class Marker:
    """A control token, its name in a text, and whether it takes the white space before and behind it."""

    token: int
    name: str
    lstrip: bool = False
    rstrip: bool = False


def cut_at_markers(text: str, markers: Sequence[Marker]) -> list[int | str]:
    """Return the control tokens that `text` names, and the stretches of text between them."""
    by_name = {marker.name: marker for marker in markers if marker.name}
    if not by_name:
        return [text] if text else []
    names = re.compile("|".join(map(re.escape, sorted(by_name, key=len, reverse=True))))
    spans: list[int | str] = []
    at, strips = 0, False
    for match in names.finditer(text):
        marker = by_name[match[0]]
        before = _stripped(text[at : match.start()], left=strips, right=marker.lstrip)
        spans += [before, marker.token] if before else [marker.token]
        at, strips = match.end(), marker.rstrip
    rest = _stripped(text[at:], left=strips, right=False)
    return [*spans, rest] if rest else spans


def tokenize_inside(tokenize: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the token ids of `text` without the space that is put in front of a text by itself."""
    wall, whole = tokenize(_WALL), tokenize(_WALL + text)
    return whole[len(wall) :] if whole[: len(wall)] == wall else tokenize(text)


def _stripped(text: str, *, left: bool, right: bool) -> str:
    text = text.lstrip(_BLANKS) if left else text
    return text.rstrip(_BLANKS) if right else text
