"""Build the Document of a report from records and facts."""

from __future__ import annotations

from ggtool.report.document import Document
from ggtool.report.sections import SECTIONS
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts


def build_report(subject: Subject, facts: Facts) -> Document:
    """Return the report of comparable records (`ggtool.report.subject.choose_subject`) and what is known of the model."""
    record = subject.newest
    return Document(
        title=f"{record.model}, quantized",
        subtitle=f"{len(subject.records)} formats on {record.corpus}, {record.test_time[:10]}",
        sections=tuple(make(subject, facts) for make in SECTIONS),
    )
