"""Document: sections of paragraphs, tables, figures and code, independent of the output format.

Texts are plain, with code between backticks. `html`, `pdf` and `markdown` decide how each block looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ggtool.report.drawing import Drawing


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Preformatted lines: commands, or bytes."""

    text: str


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, and the number to sort by where there is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A table column: its heading, and what its numbers are."""

    title: str
    explained: str = ""
    kind: Literal["text", "number", "format"] = "number"


@dataclass(frozen=True)
class Table:
    """Rows of cells. Where the first column is of kind "format", rows are searched and coloured by it."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption; `name` is the stem of its files."""

    name: str
    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Quote:
    """A text that a model wrote, and the label of its format."""

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Quotes:
    """Texts of several formats after the same prompt."""

    prompt: str
    quotes: tuple[Quote, ...]


Block = Paragraph | Bullets | Code | Table | Figure | Quotes


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @property
    def figures(self) -> list[Figure]:
        """All figures, in reading order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
