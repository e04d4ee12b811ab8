"""`ggtool report`: gather what can be known of the model, write the report in all its forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ggtool.atomic import atomic_output
from ggtool.cache import gguf_cache
from ggtool.commands.console import notifier, stdout
from ggtool.errors import GgtoolError, UsageError
from ggtool.facts import Facts, GGUFFacts, WeightFacts, read_samples
from ggtool.report.build import build_report
from ggtool.report.document import Document
from ggtool.report.html import to_html
from ggtool.report.markdown import to_markdown
from ggtool.report.pdf import to_pdf
from ggtool.report.subject import Subject, choose_subject
from ggtool.results import ResultStore
from ggtool.source import ModelSource, Notify, resolve

SAMPLES = "samples.jsonl"
# Which of the measured files explains GGUF best: a mix of types, then whatever there is.
_PREFERRED = ("gguf-q4_k_m", "gguf-q5_k_m", "gguf-q3_k_m")


def run(
    results: Path,
    out: Path,
    model: str | None,
    revision: str | None,
    gguf: Path | None,
    samples: Path | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the report of `results` to the folder `out`; UsageError when there is nothing to report."""
    if not results.is_file():
        if results.is_dir():
            raise UsageError(
                f"{results} is a folder; name the file that `ggtool sweep` or `eval` wrote, results.jsonl."
            )
        raise UsageError(f"there is no file {results}; measure with `ggtool sweep` or `ggtool study` first.")
    notify = notifier(quiet=quiet)
    source = resolve(model, revision, notify) if model else None
    if samples is None and (results.parent / SAMPLES).is_file():
        samples = results.parent / SAMPLES
    print_paths(make_report(results, out, source, gguf, samples, (), notify), as_json=as_json)


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


def write_report(document: Document, out: Path) -> list[Path]:
    """Write report.html, .pdf and .md and the figures, each whole or not at all; OutputError if that fails."""
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


def print_paths(paths: Sequence[Path], *, as_json: bool) -> None:
    """Print what was written: the three forms, and where the figures are."""
    if as_json:
        print(json.dumps([str(path) for path in paths], indent=2))
        return
    documents = [path for path in paths if path.parent == paths[0].parent]
    for path in documents:
        stdout().print(f"{path}  {path.stat().st_size / 1e6:.2f} MB", markup=False)
    n_figures = (len(paths) - len(documents)) // 2
    stdout().print(f"{paths[0].parent / 'figures'}  {n_figures} figures, .svg and .png", markup=False)


def _weights(source: ModelSource, notify: Notify) -> WeightFacts | None:
    """Return what the weights look like; a model whose weights cannot be read gets a report without them."""
    from ggtool.survey import survey_weights  # torch: only where there is a model

    try:
        return survey_weights(source)
    except GgtoolError as error:
        notify(f"The report shows no weights: {error}")
        return None


def _gguf(path: Path | None) -> GGUFFacts | None:
    if path is None:
        return None
    from ggtool.survey import read_gguf

    return read_gguf(path)


def _measured_file(source: ModelSource, subject: Subject) -> Path | None:
    """Return the cache's file of a measured GGUF format of this checkpoint, if it is still there."""
    measured = {record.label: record for record in subject.measured if record.format.startswith("gguf-")}
    ranked = [label for label in _PREFERRED if label in measured] + list(measured)
    folder = gguf_cache(source.sha256)
    paths = (folder / measured[label].artifact for label in ranked)
    return next((path for path in paths if path.is_file()), None)
