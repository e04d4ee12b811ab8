"""`ggtool study`: the preset's measurements, texts of every format, and the report, in one folder.

DIR/results.jsonl, DIR/samples.jsonl    kept; the next run adds what is missing
DIR/report.html, .pdf, .md, figures/    written anew by each run
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import DEVICES_HELP, Json, Model, Quiet, Revision, Threads, WaitForQuiet
from ggtool.cli.ray_flag import RayAddress
from ggtool.errors import MeasureError
from ggtool.system.schedule.work import Relay, Scheduler, Watch

if TYPE_CHECKING:
    from ggtool.evaluation.plan import Plan
    from ggtool.evaluation.request import EvalRequest
    from ggtool.evaluation.samples import SampleSettings
    from ggtool.results.samples import Sample


def study(
    model: Model = None,
    revision: Revision = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for results and report; what it has is kept.")
    ] = Path("study"),
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus", help="A named corpus, or a text file. Default: as for eval.", show_default=False
        ),
    ] = None,
    chunks: Annotated[
        int, typer.Option("--chunks", min=0, help="Chunks to score; 0 takes the whole text.")
    ] = 40,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Tasks to answer as well, as for sweep.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Items of each task; 0 takes all.")] = 0,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="A text for every format to continue. Repeatable.", show_default=False
        ),
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", min=1, help="New tokens a text.")] = 40,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the texts' random numbers.")] = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until a measurement counts as failed.")
    ] = 7200,
    wait_for_quiet: WaitForQuiet = None,
    threads: Threads = 0,
    device: Annotated[str, typer.Option("--device", help=DEVICES_HELP)] = "auto",
    ray: RayAddress = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the preset study, let each format write, and end with the report that answers its questions.

    A stopped study goes on where it was; a format that fails is a row with its reason and exit code 1.

    Example: [bold]ggtool study --model ./my-gpt2 -o study[/bold]
    """
    from ggtool.evaluation.experiment import find_preset, read_experiment, request_from
    from ggtool.evaluation.samples import PROMPTS, SampleSettings
    from ggtool.formats import split_list

    flags = {
        "model": model,
        "revision": revision,
        "corpus": corpus,
        "chunks": chunks,
        "tasks": None if tasks is None else tuple(split_list(tasks)),
        "limit": limit,
        "timeout": timeout,
        "wait_for_quiet": wait_for_quiet,
        "threads": threads,
        "device": device,
    }
    request = request_from(read_experiment(find_preset("study")), flags)
    settings = SampleSettings(prompts=tuple(prompt or PROMPTS), n_predict=n_predict, seed=seed)
    run(request, settings, out, ray, threads, as_json=json_, quiet=quiet)


def run(
    request: EvalRequest,
    settings: SampleSettings,
    out: Path,
    ray: str | None,
    threads: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Do all of it in the folder `out`, on a Ray cluster if one is named; MeasureError at the end if a format failed."""
    from ggtool.cli.board import measure, measure_on
    from ggtool.cli.console import notifier, progress_bar
    from ggtool.cli.make_report import make_report
    from ggtool.cli.records import refuse_failures
    from ggtool.cli.report import SAMPLES, print_paths
    from ggtool.evaluation.evaluate import here
    from ggtool.evaluation.plan import plan

    notify = notifier(quiet=quiet)
    with _stopped(out):
        if ray is None:
            with progress_bar(quiet=quiet) as update:
                what = plan(request, notify, update)
            records = measure(what, out / "results.jsonl", quiet=quiet)
            with progress_bar(quiet=quiet) as update:
                watch = Relay(lambda work, _, done, total: update(work.label, done, total))
                _write_samples(what, settings, out / SAMPLES, here(what), watch)
        else:
            from ggtool.cli.cluster_board import ClusterBoard
            from ggtool.cli.cluster_run import planned_on_ray

            with planned_on_ray(ray, request, threads, quiet=quiet) as (what, scheduler):
                records = measure_on(scheduler, what, out / "results.jsonl", quiet=quiet)
                board = ClusterBoard(None, scheduler, quiet=quiet)
                with board.live():
                    _write_samples(what, settings, out / SAMPLES, scheduler, board)
        command = shlex.join(["ggtool", *sys.argv[1:]])
        paths = make_report(out / "results.jsonl", out, what.source, None, out / SAMPLES, [command], notify)
    print_paths(paths, as_json=as_json)
    refuse_failures(records)


def _write_samples(
    what: Plan, settings: SampleSettings, path: Path, scheduler: Scheduler, watch: Watch
) -> None:
    """Write the texts of all formats, the file whole after each format."""
    from ggtool.evaluation.samples import make_samples
    from ggtool.results.samples import read_samples, samples_json
    from ggtool.system.atomic import atomic_output

    assert what.source is not None
    known = read_samples(path) if path.is_file() else []
    made: list[Sample] = []
    for samples in make_samples(what, what.source, settings, known, scheduler, watch):
        made += samples
        later = {sample.key for sample in made}
        kept = [sample for sample in known if sample.key not in later]
        with atomic_output(path, force=True) as temporary:
            temporary.write_text(samples_json([*made, *kept]), encoding="utf-8")
    order = {target.label: number for number, target in enumerate(what.targets)}
    made.sort(key=lambda sample: order[sample.format])  # stable: prompts stay in their order
    with atomic_output(path, force=True) as temporary:  # drops texts that are no longer asked for
        temporary.write_text(samples_json(made), encoding="utf-8")


@contextmanager
def _stopped(out: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise MeasureError(f"stopped; what is finished is in {out}, and the same command goes on.") from None
