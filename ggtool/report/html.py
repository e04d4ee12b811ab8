"""A document as one self-contained HTML page: no network, no other files."""

from __future__ import annotations

from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ggtool.report.document import Document
from ggtool.report.families import FAMILIES, family_of
from ggtool.report.inline import render

_PAGE = Path(__file__).parent / "page"


def to_html(document: Document) -> str:
    """Return the page with its style, its script and its figures inside."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.globals["family_of"] = family_of
    return environment.get_template("page.html").render(
        document=document,
        families=FAMILIES,
        style=Markup((_PAGE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        script=Markup((_PAGE / "page.js").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        drawn={figure.name: Markup(figure.drawing.inline_svg(figure.name)) for figure in document.figures},  # noqa: S704 - matplotlib escapes its texts
    )


def _prose(text: str) -> Markup:
    return Markup(render(text, escape, lambda code: f"<code>{escape(code)}</code>"))  # noqa: S704 - both parts are escaped
