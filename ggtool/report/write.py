"""Write a report: the page, the PDF, the Markdown and the figures, each file atomically."""

from __future__ import annotations

from pathlib import Path

from ggtool.report.document import Document
from ggtool.report.html import to_html
from ggtool.report.markdown import to_markdown
from ggtool.report.pdf import to_pdf
from ggtool.system.atomic import atomic_output


def write_report(document: Document, out: Path) -> list[Path]:
    """Write report.html, .pdf, .md and the figures, each file atomically; OutputError if that fails."""
    files: dict[str, bytes] = {
        "report.html": to_html(document).encode(),
        "report.pdf": to_pdf(document),
        "report.md": to_markdown(document).encode(),
    }
    for figure in document.figures:
        files[f"figures/{figure.name}.svg"] = figure.drawing.svg.encode()
        files[f"figures/{figure.name}.png"] = figure.drawing.png
    for name, data in files.items():
        with atomic_output(out / name, force=True) as temporary:
            temporary.write_bytes(data)
    return [out / name for name in files]
