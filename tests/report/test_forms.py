"""Page, PDF and Markdown hold the whole document, and what a model wrote stays a text in all of them."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_facts import FACTS, sample
from made_records import RECORDS, failed, record

from ggtool.report.build import build_report
from ggtool.report.document import Document
from ggtool.report.html import to_html
from ggtool.report.markdown import to_markdown
from ggtool.report.pdf import to_pdf
from ggtool.report.subject import choose_subject
from ggtool.results.model_facts import Facts


@pytest.fixture(scope="module")
def document() -> Document:
    return build_report(choose_subject([*RECORDS, failed("bnb-fp4", "died & <gone>")]), FACTS)


class Page(HTMLParser):
    """Ids, references and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in {"src", "href", "xlink:href", "srcset", "data"}:
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_beside_it(document: Document) -> None:
    text = to_html(document)
    page = Page(text)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert len(text.encode()) < 3e6
    assert {f"#{section.name}" for section in document.sections} <= set(page.links)


def test_ids_of_a_page_are_its_own_and_links_lead_somewhere(document: Document) -> None:
    page = Page(to_html(document))
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(page.ids)
    # matplotlib names a shape after its content, so the same shape may come twice in a figure.
    shared = {name for name in page.ids if page.ids.count(name) > 1}
    assert all(re.search(r"-[mp][0-9a-f]{10}$", name) for name in shared)


def test_what_a_model_wrote_is_no_markup(document: Document) -> None:
    text = to_html(document)
    assert "<script>alert" not in text
    assert Page(text).tags.count("script") == 1
    assert "of <script>alert(1)</script>" in Page(text).texts
    assert "died & <gone>" in "".join(Page(text).texts)


def test_markdown_has_every_section_table_and_figure(document: Document) -> None:
    text = to_markdown(document)
    assert re.findall(r"^## (.+)$", text, re.M) == [section.title for section in document.sections]
    assert re.findall(r"\]\(figures/(.+)\.svg\)", text) == [figure.name for figure in document.figures]
    widths = [
        {line.replace("\\|", "").count("|") for line in rows.splitlines()}
        for rows in re.findall(r"(?:^\|.*\n)+", text, re.M)
    ]
    assert widths
    assert all(len(width) == 1 for width in widths)
    assert "\\<script\\>" in text


def test_figures_are_whole_files_that_come_out_the_same(document: Document) -> None:
    again = build_report(choose_subject([*RECORDS, failed("bnb-fp4", "died & <gone>")]), FACTS)
    for figure, other in zip(document.figures, again.figures, strict=True):
        ElementTree.fromstring(figure.drawing.svg)
        assert figure.drawing.svg == other.drawing.svg
        assert figure.drawing.png.startswith(b"\x89PNG")
        ids = re.findall(r'id="(mark\d+)"', figure.drawing.svg)
        assert set(ids) == set(figure.drawing.marks)


@pytest.mark.skipif(
    shutil.which("pdftotext") is None, reason="pdftotext (Debian: poppler-utils) is not installed"
)
@pytest.mark.parametrize("facts", [FACTS, Facts()], ids=["all facts", "no facts"])
def test_the_pdf_has_every_section_and_every_format(facts: Facts, tmp_path: Path) -> None:
    document = build_report(choose_subject([*RECORDS, failed("bnb-fp4", "died & <gone>")]), facts)
    path = tmp_path / "report.pdf"
    path.write_bytes(to_pdf(document))
    text = subprocess.run(
        ["pdftotext", "-layout", path, "-"], capture_output=True, text=True, check=True
    ).stdout
    for section in document.sections:
        assert section.title in text
    for found in RECORDS:
        assert found.label in text
    assert "died & <gone>" in text
    assert text.count("weights, MiB") == 3  # inside figures, too, a text is a text


def test_sixty_formats_and_a_long_text_find_room_in_a_pdf() -> None:
    ladder = [record(f"gguf-q{n}_k", 4.0 + n, 1 / (n + 1), tg_ts=100.0 + n) for n in range(60)]
    long = sample(ladder[0].label, (1,), "and so it went on and on " * 600)
    assert to_pdf(build_report(choose_subject([RECORDS[0], *ladder]), Facts(samples=(long,)))).startswith(
        b"%PDF"
    )


def test_a_pdf_of_the_same_document_is_the_same(document: Document) -> None:
    assert to_pdf(document) == to_pdf(document)
