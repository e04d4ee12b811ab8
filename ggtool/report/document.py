"""A document between its contents and its three forms: sections of paragraphs, tables, figures and code.

Texts are plain; what stands between backticks is code. A form decides how each block looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ggtool.report.drawing import Drawing


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """Sentences that stand by themselves, one a line."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Lines to be typed, or bytes to be looked at."""

    text: str


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the number to sort by where that is not the text."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A heading; `explained` says what the numbers are."""

    title: str
    explained: str = ""
    kind: Literal["text", "number", "format"] = "number"


@dataclass(frozen=True)
class Table:
    """Rows of cells. A first column of kind "format" names formats, by which rows are searched and coloured."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with the sentence that says what it shows; `name` is that of its files."""

    name: str
    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Quote:
    """A text by a model, under the label of its format."""

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Quotes:
    """Texts side by side after one prompt."""

    prompt: str
    quotes: tuple[Quote, ...]


Block = Paragraph | Bullets | Code | Table | Figure | Quotes


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """All of a report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @property
    def figures(self) -> list[Figure]:
        """Every figure, in the order they are read."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
