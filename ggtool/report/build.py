"""Records and facts in, a Document out."""

from __future__ import annotations

from ggtool.facts import Facts
from ggtool.report.document import Document
from ggtool.report.sections import SECTIONS
from ggtool.report.subject import Subject


def build_report(subject: Subject, facts: Facts) -> Document:
    """Return the report of comparable records (`ggtool.report.subject.choose_subject`) and what is known of the model."""
    record = subject.newest
    return Document(
        title=f"{record.model}, quantized",
        subtitle=f"{len(subject.records)} formats on {record.corpus}, {record.test_time[:10]}",
        sections=tuple(make(subject, facts) for make in SECTIONS),
    )
