"""Words wrap at the terminal's width as they come, and Markdown's marks become styles."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggtool.chat.wrap import Wrapper

BOLD, CODE, DIM, END = "\x1b[1m", "\x1b[36m", "\x1b[2m", "\x1b[0m"


def wrapped(text: str, width: int, *, markdown: bool = False, piece: int = 3) -> str:
    out: list[str] = []
    wrapper = Wrapper(out.append, markdown=markdown, width=lambda: width)
    for at in range(0, len(text), piece):
        wrapper.add(text[at : at + piece])
    wrapper.finish()
    return "".join(out)


def test_words_are_not_broken() -> None:
    assert wrapped("the wall was raised again", 14) == "the wall was\nraised again"
    assert wrapped("a verylongwordindeed b", 8) == "a\nverylongwordindeed\nb"
    assert wrapped("one\n\n  two  ", 40) == "one\n\n  two  "
    assert wrapped("日本語 日本語", 8) == "日本語\n日本語"  # two columns a character


@given(st.text(alphabet="ab *`#\n", max_size=80), st.integers(4, 30), st.integers(1, 9), st.booleans())
def test_nothing_is_lost_and_pieces_do_not_matter(text, width, piece, markdown) -> None:
    found = wrapped(text, width, markdown=markdown, piece=piece)
    assert found == wrapped(text, width, markdown=markdown, piece=len(text) or 1)
    plain = re.sub(r"\x1b\[\d+m", "", found)
    assert re.sub(r"\s", "", plain) == re.sub(r"\s", "", text)
    for line in plain.split("\n"):
        assert len(line.rstrip()) <= width or " " not in line.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b c** d", f"a **{BOLD}b c{END}** d"),
        ("use `x y` now", f"use `{CODE}x y{END}` now"),
        ("# Title\ntext", f"{BOLD}# Title{END}\ntext"),
        ("```py\nx = 1\n```\nend", f"{DIM}```py{END}\n{CODE}x = 1{END}\n{DIM}```{END}\nend"),
        ("**never closed", f"**{BOLD}never closed{END}"),
    ],
)
def test_markdown(text, expected) -> None:
    assert wrapped(text, 80, markdown=True) == expected
    assert wrapped(text, 80) == text
