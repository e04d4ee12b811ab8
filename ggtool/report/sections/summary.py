"""The summary section: what to choose, what is dominated, what the errors leave open."""

from __future__ import annotations

from ggtool.report.document import Bullets, Section
from ggtool.report.subject import Subject
from ggtool.report.summary import summarize
from ggtool.results.model_facts import Facts


def section(subject: Subject, _facts: Facts) -> Section:
    """Return the summary."""
    return Section("summary", "Summary", (Bullets(summarize(subject)),))
