"""A document as Markdown (GitHub's tables); figures are the SVG files in figures/."""

from __future__ import annotations

import re

from ggtool.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Paragraph,
    Quotes,
    Table,
)
from ggtool.report.inline import render

_SPECIAL = re.compile(r"([\\*_<>\[\]|#~])")


def to_markdown(document: Document) -> str:
    """Return the whole document as text."""
    parts = [f"# {_escape(document.title)}", _escape(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _text(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_text(item)}" for item in block.items)
    if isinstance(block, Code):
        return f"```\n{block.text}\n```"
    if isinstance(block, Figure):
        return f"![{_escape(block.drawing.alt)}](figures/{block.name}.svg)\n\n{_text(block.caption)}"
    if isinstance(block, Quotes):
        rows = [[f"`{quote.label}`", _line(quote.text), _line(quote.note)] for quote in block.quotes]
        return f"After “{_line(block.prompt)}”:\n\n" + _grid(
            ["format", "text", "against the reference"], "---", rows
        )
    return _table(block)


def _table(table: Table) -> str:
    rows = [
        [
            f"`{cell.text}`" if column.kind == "format" else _line(cell.text)
            for column, cell in zip(table.columns, row, strict=True)
        ]
        for row in table.rows
    ]
    marks = ["--:" if column.kind == "number" else "---" for column in table.columns]
    caption = f"{_text(table.caption)}\n\n" if table.caption else ""
    return caption + _grid([_escape(column.title) for column in table.columns], marks, rows)


def _grid(titles: list[str], marks: str | list[str], rows: list[list[str]]) -> str:
    each = [marks] * len(titles) if isinstance(marks, str) else marks
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, each, *rows])


def _text(text: str) -> str:
    return render(text, _escape, lambda code: f"`{code}`")


def _line(text: str) -> str:
    return _escape(" ".join(text.split()))


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text).replace("`", "\\`")
