"""The sections of a report, one a file; each makes a Section of records and facts.

Each answers one question of the study, and says how to get what was not measured or gathered.
"""

from __future__ import annotations

from collections.abc import Callable

from ggtool.report.document import Section
from ggtool.report.sections import (
    bnb,
    formats,
    gguf,
    latency,
    levels,
    memory,
    method,
    pareto,
    parts,
    quality,
    summary,
    tasks,
    texts,
)
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts

SECTIONS: tuple[Callable[[Subject, Facts], Section], ...] = (
    summary.section,
    formats.section,
    memory.section,
    latency.section,
    quality.section,
    tasks.section,
    pareto.section,
    parts.section,
    levels.section,
    bnb.section,
    gguf.section,
    texts.section,
    method.section,
)
