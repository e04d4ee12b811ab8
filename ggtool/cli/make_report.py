"""Collect the facts of a model beside its records and write the report, for `report` and `study`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ggtool.conversion.cached import gguf_folder
from ggtool.errors import GgtoolError
from ggtool.report.build import build_report
from ggtool.report.subject import Subject, choose_subject
from ggtool.report.write import write_report
from ggtool.results.model_facts import Facts, GGUFFacts, WeightFacts
from ggtool.results.samples import read_samples
from ggtool.results.store import ResultStore
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import Notify

# Measured files that explain GGUF best, a mix of types first; else any.
_PREFERRED = ("gguf-q4_k_m", "gguf-q5_k_m", "gguf-q3_k_m")


def make_report(
    results: Path,
    out: Path,
    source: ModelSource | None,
    gguf: Path | None,
    samples: Path | None,
    commands: Sequence[str],
    notify: Notify,
) -> list[Path]:
    """Gather, build and write; return the written files, the page first."""
    store = ResultStore(results)
    if n_strange := store.n_strange:
        notify(f"{results}: {n_strange} of its lines are no records of this version and are left out.")
    subject = choose_subject(store, source.model if source else None)
    facts = Facts(
        weights=_weights(source, notify) if source else None,
        gguf=_gguf(gguf or (_measured_file(source, subject) if source else None)),
        samples=tuple(read_samples(samples)) if samples else (),
        commands=tuple(commands),
    )
    return write_report(build_report(subject, facts), out)


def _weights(source: ModelSource, notify: Notify) -> WeightFacts | None:
    """Return statistics of the weights; None, with a note, where they cannot be read."""
    from ggtool.evaluation.inspect_model import survey_weights  # torch: only where there is a model

    try:
        return survey_weights(source)
    except GgtoolError as error:
        notify(f"The report shows no weights: {error}")
        return None


def _gguf(path: Path | None) -> GGUFFacts | None:
    if path is None:
        return None
    from ggtool.evaluation.inspect_model import read_gguf

    return read_gguf(path)


def _measured_file(source: ModelSource, subject: Subject) -> Path | None:
    """Return the cache's file of a measured GGUF format of this checkpoint, if it is still there."""
    measured = {record.label: record for record in subject.measured if record.format.startswith("gguf-")}
    ranked = [label for label in _PREFERRED if label in measured] + list(measured)
    folder = gguf_folder(source)
    paths = (folder / measured[label].artifact for label in ranked)
    return next((path for path in paths if path.is_file()), None)
