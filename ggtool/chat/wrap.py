"""An answer at a terminal as it comes: words wrap at its width, Markdown's marks become bold and colour.

A word is held back until what follows it is known. Of Markdown there is what changes how a line looks: headings, **bold**,
`code` and fenced code; all else stays as the model wrote it. The width is asked for at every word, so that a
window may be resized in the middle of an answer.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from wcwidth import wcswidth

_BOLD, _CODE, _DIM, _END = "\x1b[1m", "\x1b[36m", "\x1b[2m", "\x1b[0m"
_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
_MARK = re.compile(r"\*\*|`")
_DEFAULT_WIDTH = 80
_LONGEST_HELD = 24  # characters without a blank; what is longer goes on in parts


def terminal_width() -> int:
    """Return the columns of the terminal that stdout is; COLUMNS in the environment would not know of a resize."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or _DEFAULT_WIDTH
    except (OSError, ValueError):
        return _DEFAULT_WIDTH


class Wrapper:
    """Takes pieces of text and passes them on as whole words, lines broken between them.

    write: takes text to show. markdown: whether marks are turned into styles. width: the terminal's columns, asked for at every word.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        *,
        markdown: bool,
        width: Callable[[], int] | None = None,
    ) -> None:
        self._write, self._markdown, self._width = write, markdown, width or terminal_width
        self._held = ""
        self._blank = ""  # between the last word and the next: left out where a line is broken
        self._column = 0
        self._in_fence = self._bold = self._code = False
        self._line_style = ""  # of a heading or a line of code

    def add(self, text: str) -> None:
        """Take the next piece."""
        self._held += text
        parts = _PARTS.findall(self._held)
        self._held = ""
        if parts and not parts[-1].isspace():
            self._held = parts.pop()
        for part in parts:
            self._take(part)
        while len(self._held) > _LONGEST_HELD:
            first, self._held = self._held[:_LONGEST_HELD], self._held[_LONGEST_HELD:]
            self._take(first)

    def finish(self) -> None:
        """Show what was held back and end all styles."""
        held, self._held = self._held, ""
        if held:
            self._take(held)
        self._write(self._blank)
        self._blank = ""
        if self._line_style or self._bold or self._code:
            self._write(_END)

    def _take(self, part: str) -> None:
        if part == "\n":
            self._write(f"{self._blank}{_END if self._line_style else ''}\n")
            self._blank, self._column, self._line_style = "", 0, ""
        elif part.isspace():
            self._blank += part
        else:
            for start in range(0, len(part), _LONGEST_HELD):
                self._word(part[start : start + _LONGEST_HELD])

    def _word(self, word: str) -> None:
        if self._markdown and self._column == 0 and not self._blank:
            self._begin_line(word)
        columns = _columns(word)
        blank = _columns(self._blank.expandtabs(4))
        if self._column and self._column + blank + columns > self._width():
            self._write("\n")
            self._column = blank = 0
        else:
            self._write(self._blank)
        self._blank = ""
        self._write(self._styled(word))
        self._column += blank + columns

    def _begin_line(self, word: str) -> None:
        if word.startswith("```"):
            self._in_fence = not self._in_fence
            self._line_style = _DIM
        elif self._in_fence:
            self._line_style = _CODE
        elif set(word) == {"#"}:
            self._line_style = _BOLD
        if self._line_style:
            self._write(self._line_style)

    def _styled(self, word: str) -> str:
        if not self._markdown or self._line_style:
            return word

        def switch(match: re.Match[str]) -> str:
            if match[0] == "`":
                self._code = not self._code
                return match[0] + _CODE if self._code else _END + (_BOLD if self._bold else "") + match[0]
            if self._code:
                return match[0]
            self._bold = not self._bold
            return match[0] + _BOLD if self._bold else _END + match[0]

        return _MARK.sub(switch, word)


def _columns(text: str) -> int:
    n = wcswidth(text)
    return n if n >= 0 else len(text)
