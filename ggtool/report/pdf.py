"""A document as a PDF: A4, with an outline, vector figures and searchable text."""

from __future__ import annotations

import io
from html import escape
from typing import Any

from reportlab.graphics.shapes import Drawing as Graphic
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import (
    Flowable,
    KeepTogether,
    ListFlowable,
    ListItem,
    Preformatted,
    SimpleDocTemplate,
    Spacer,
)
from reportlab.platypus import Paragraph as Prose
from reportlab.platypus import Table as Grid
from svglib.fonts import register_font
from svglib.svglib import svg2rlg

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
from ggtool.report.drawing import FONT, font_files
from ggtool.report.families import family_of
from ggtool.report.inline import render

_MARGIN = 17 * mm
_WIDTH = A4[0] - 2 * _MARGIN
_TALLEST = A4[1] - 2 * _MARGIN - 30 * mm  # of a figure, so that its caption fits under it
_MONO, _BOLD = "DejaVu Sans Mono", "DejaVu Sans Bold"
_INK, _SOFT, _RULE, _BACK = map(colors.HexColor, ("#1a1c20", "#5a606b", "#c9ccd3", "#f3f4f6"))
_CELL_POINTS = 6.6
_PADDING = 3.0

_TEXT = ParagraphStyle("text", fontName=FONT, fontSize=8.8, leading=12.4, textColor=_INK, spaceAfter=5)
_SMALL = ParagraphStyle("small", _TEXT, fontSize=7.4, leading=9.6, textColor=_SOFT)
_TITLE = ParagraphStyle("title", _TEXT, fontName=_BOLD, fontSize=20, leading=25)
_HEADING = ParagraphStyle(
    "heading", _TEXT, fontName=_BOLD, fontSize=13, leading=17, spaceBefore=14, keepWithNext=1
)
_PROMPT = ParagraphStyle("prompt", _TEXT, fontName=_BOLD, fontSize=8.8, spaceBefore=6, keepWithNext=1)
_CODE = ParagraphStyle(
    "code",
    fontName=_MONO,
    fontSize=6.6,
    leading=9,
    backColor=_BACK,
    borderPadding=4,
    spaceBefore=4,
    spaceAfter=8,
)
_CELL = ParagraphStyle(
    "cell", fontName=FONT, fontSize=_CELL_POINTS, leading=8.4, textColor=_INK, splitLongWords=1
)
_NUMBER = ParagraphStyle("number", _CELL, alignment=2)
_HEAD = ParagraphStyle("head", _CELL, fontName=_BOLD, textColor=_SOFT)
_NUMBER_HEAD = ParagraphStyle("number head", _HEAD, alignment=2)


class _Anchor(Flowable):
    """A flowable that adds an outline entry at its position."""

    def __init__(self, name: str, title: str) -> None:
        super().__init__()
        self.name, self.title = name, title

    def wrap(self, *_available: float) -> tuple[float, float]:
        return (0, 0)

    def draw(self) -> None:
        self.canv.bookmarkPage(self.name)
        self.canv.addOutlineEntry(self.title, self.name)


def to_pdf(document: Document) -> bytes:
    """Return the whole document as a PDF file."""
    _register_fonts()
    out = io.BytesIO()
    template = SimpleDocTemplate(
        out,
        pagesize=A4,
        leftMargin=_MARGIN,
        rightMargin=_MARGIN,
        topMargin=_MARGIN,
        bottomMargin=_MARGIN,
        title=document.title,
        author="ggtool",
        invariant=1,
    )
    story: list[Any] = [Prose(escape(document.title), _TITLE), Prose(escape(document.subtitle), _SMALL)]
    for section in document.sections:
        story += [_Anchor(section.name, section.title), Prose(escape(section.title), _HEADING)]
        for block in section.blocks:
            story += _block(block)

    def footer(canvas: Any, _template: Any) -> None:
        canvas.setFont(FONT, 7)
        canvas.setFillColor(_SOFT)
        canvas.drawString(_MARGIN, 9 * mm, document.title)
        canvas.drawRightString(A4[0] - _MARGIN, 9 * mm, str(canvas.getPageNumber()))

    template.build(story, onFirstPage=footer, onLaterPages=footer)
    return out.getvalue()


def _register_fonts() -> None:
    files = font_files()
    for name, style in ((FONT, "regular"), (_BOLD, "bold"), (_MONO, "mono")):
        pdfmetrics.registerFont(TTFont(name, str(files[style])))
    register_font(FONT, str(files["regular"]))


def _block(block: Block) -> list[Any]:
    if isinstance(block, Paragraph):
        return [Prose(_text(block.text), _TEXT)]
    if isinstance(block, Bullets):
        items: list[Any] = [ListItem(Prose(_text(item), _TEXT), leftIndent=10) for item in block.items]
        return [ListFlowable(items, bulletType="bullet", start="•", bulletFontName=FONT, leftIndent=10)]
    if isinstance(block, Code):
        return [Preformatted(block.text, _CODE, maxLineLength=118)]
    if isinstance(block, Figure):
        return [KeepTogether([_graphic(block), Prose(_text(block.caption), _SMALL)]), Spacer(0, 4)]
    if isinstance(block, Quotes):
        return _quotes(block)
    return _table(block)


def _graphic(figure: Figure) -> Graphic:
    drawn: Graphic | None = svg2rlg(io.BytesIO(figure.drawing.svg.encode()))
    assert drawn is not None
    scale = min(_WIDTH / drawn.width, _TALLEST / drawn.height)
    drawn.width, drawn.height = drawn.width * scale, drawn.height * scale
    drawn.scale(scale, scale)
    return drawn


def _quotes(block: Quotes) -> list[Any]:
    rows = [
        [
            Prose(f'<font name="{_MONO}">{escape(quote.label)}</font><br/>{escape(quote.note)}', _CELL),
            Prose(escape(" ".join(quote.text.split())), _CELL),
        ]
        for quote in block.quotes
    ]
    grid = Grid(rows, colWidths=[0.24 * _WIDTH, 0.76 * _WIDTH], hAlign="LEFT", splitInRow=1)
    grid.setStyle(_RULES)
    return [Prose(f"“{escape(block.prompt)}”", _PROMPT), grid]


_RULES: list[Any] = [
    ("VALIGN", (0, 0), (-1, -1), "TOP"),
    ("LINEBELOW", (0, 0), (-1, -1), 0.4, _RULE),
    ("LEFTPADDING", (0, 0), (-1, -1), _PADDING),
    ("RIGHTPADDING", (0, 0), (-1, -1), _PADDING),
    ("TOPPADDING", (0, 0), (-1, -1), 2),
    ("BOTTOMPADDING", (0, 0), (-1, -1), 2),
]


def _table(table: Table) -> list[Any]:
    heads = [Prose(escape(c.title), _NUMBER_HEAD if c.kind == "number" else _HEAD) for c in table.columns]
    rows = [
        [_cell(cell.text, column.kind) for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    grid = Grid([heads, *rows], colWidths=_column_widths(table), repeatRows=1, hAlign="LEFT")
    grid.setStyle(_RULES)
    caption = [Prose(_text(table.caption), _SMALL)] if table.caption else []
    return [*caption, grid, Spacer(0, 8)]


def _cell(text: str, kind: str) -> Any:
    if kind == "format":
        dot = f'<font color="{family_of(text).colour}">■</font> '
        return Prose(f'{dot}<font name="{_MONO}">{escape(text)}</font>', _CELL)
    return Prose(escape(text), _NUMBER if kind == "number" else _CELL)


def _column_widths(table: Table) -> list[float]:
    """Return column widths that fit the widest cells, scaled down where the page is too narrow."""
    needed = []
    for i, column in enumerate(table.columns):
        font = _MONO if column.kind == "format" else FONT
        cells = [pdfmetrics.stringWidth(row[i].text, font, _CELL_POINTS) for row in table.rows]
        head = max(pdfmetrics.stringWidth(word, _BOLD, _CELL_POINTS) for word in column.title.split() or [""])
        mark = 2 * _CELL_POINTS if column.kind == "format" else 0.0
        needed.append(max([head, *(cell + mark for cell in cells)]) + 2 * _PADDING + 1)
    excess = sum(needed) - _WIDTH
    while excess > 0.01:
        widest = max(range(len(needed)), key=needed.__getitem__)
        second = max((width for i, width in enumerate(needed) if i != widest), default=0.0)
        cut = min(excess, max(needed[widest] - second, 6.0))
        needed[widest] -= cut
        excess -= cut
    return needed


def _text(text: str) -> str:
    return render(
        text,
        escape,
        lambda code: f'<font name="{_MONO}" size="{_TEXT.fontSize - 0.8:g}">{escape(code)}</font>',
    )
