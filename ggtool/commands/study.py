"""`ggtool study`: the preset's measurements, texts of every format, and the report, in one folder.

DIR/results.jsonl, DIR/samples.jsonl    kept and gone on with by the next run
DIR/report.html, .pdf, .md, figures/    made anew by each run
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ggtool.atomic import atomic_output
from ggtool.commands.console import notifier, progress_bar
from ggtool.commands.evaluation import refuse_failures
from ggtool.commands.report import SAMPLES, make_report, print_paths
from ggtool.commands.sweep import measure
from ggtool.errors import MeasureError
from ggtool.facts import Sample, read_samples, samples_json
from ggtool.plan import Plan, Request, Target, plan
from ggtool.samples import Settings, make_samples
from ggtool.source import ModelSource, resolve


def run(request: Request, settings: Settings, out: Path, *, as_json: bool, quiet: bool) -> None:
    """Do all of it in the folder `out`; MeasureError at the end if a format failed."""
    notify = notifier(quiet=quiet)
    with _stopped(out):
        with progress_bar(quiet=quiet) as update:
            what = plan(request, notify, update)
        source = resolve(request.model, request.revision, lambda _: None)  # the plan has said which
        records = measure(what, out / "results.jsonl", quiet=quiet)
        _write_samples(what, source, settings, out / SAMPLES, quiet=quiet)
        command = shlex.join(["ggtool", *sys.argv[1:]])
        paths = make_report(out / "results.jsonl", out, source, None, out / SAMPLES, [command], notify)
    print_paths(paths, as_json=as_json)
    refuse_failures(records)


def _write_samples(what: Plan, source: ModelSource, settings: Settings, path: Path, *, quiet: bool) -> None:
    """Write the texts of all formats, the file whole after each format."""
    known = read_samples(path) if path.is_file() else []
    made: list[Sample] = []
    with progress_bar(quiet=quiet) as update:

        def relay(target: Target, done: int, total: int) -> None:
            update(f"{target.label}: writing", done, total)

        for samples in make_samples(what, source, settings, known, relay):
            made += samples
            later = {sample.key for sample in made}
            kept = [sample for sample in known if sample.key not in later]
            with atomic_output(path, force=True) as temporary:
                temporary.write_text(samples_json([*made, *kept]), encoding="utf-8")
    with atomic_output(path, force=True) as temporary:  # what nothing asks for any more is gone
        temporary.write_text(samples_json(made), encoding="utf-8")


@contextmanager
def _stopped(out: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise MeasureError(f"stopped; what is finished is in {out}, and the same command goes on.") from None
