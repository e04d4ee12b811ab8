"""`ggtool sweep`: a whole experiment; skips what is recorded, so a stopped run goes on.

A flag is None where it was not given, for then the experiment's file counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.eval_flags import EvalFlags, takes_eval_flags
from ggtool.cli.flags import Json, Quiet
from ggtool.cli.ray_flag import RayAddress
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.evaluation.plan import Plan
    from ggtool.evaluation.record_keys import Known
    from ggtool.evaluation.request import EvalRequest


@takes_eval_flags
def sweep(
    flags: EvalFlags,
    file: Annotated[
        Path | None,
        typer.Argument(help="A .yaml file with the experiment's settings.", show_default=False),
    ] = None,
    *,
    preset: Annotated[
        str | None, typer.Option("--preset", help="study or gguf-ladder.", show_default=False)
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Records are kept here; what it has is not measured again.")
    ] = Path("results.jsonl"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the rows, kept or to do, and measure nothing.")
    ] = False,
    ray: RayAddress = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a whole experiment; what was measured before is kept, and a stopped run goes on.

    The experiment is a list of formats, a YAML file or a preset; flags count before the file.

    Examples:
    [bold]ggtool sweep --preset study --model ./my-gpt2[/bold]

    [bold]ggtool sweep mine.yaml --chunks 0[/bold]

    [bold]ggtool sweep mine.yaml --ray head-node:6379 --threads 4[/bold]
    """
    from ggtool.evaluation.experiment import find_preset, read_experiment, request_from

    if file is not None and preset is not None:
        raise UsageError("FILE and --preset exclude each other; pass only one of them.")
    path = find_preset(preset) if preset is not None else file
    settings = read_experiment(path) if path else {}
    request = request_from(settings, flags.settings())
    if ray is not None and not dry_run:
        threads = flags.threads or settings.get("threads")
        _run_on_ray(ray, request, out, threads, as_json=json_, quiet=quiet)
        return
    _run(request, out, dry_run=dry_run, as_json=json_, quiet=quiet)


def _run_on_ray(
    address: str, request: EvalRequest, out: Path, threads: int | None, *, as_json: bool, quiet: bool
) -> None:
    """Measure as `_run` does, on the nodes of a Ray cluster."""
    from ggtool.cli.board import measure_on
    from ggtool.cli.cluster_run import planned_on_ray
    from ggtool.cli.records import print_records, refuse_failures
    from ggtool.system.atomic import refuse_unwritable

    refuse_unwritable(out)
    with planned_on_ray(address, request, threads, quiet=quiet) as (what, scheduler):
        records = measure_on(scheduler, what, out, quiet=quiet)
    print_records(records, as_json=as_json)
    refuse_failures(records)


def _run(request: EvalRequest, out: Path, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Measure what `out` does not hold yet of `request`; MeasureError at the end if a format failed."""
    from ggtool.cli.board import measure
    from ggtool.cli.console import notifier, progress_bar
    from ggtool.cli.records import print_records, refuse_failures
    from ggtool.evaluation.plan import plan
    from ggtool.evaluation.record_keys import find_known
    from ggtool.results.store import ResultStore
    from ggtool.system.atomic import refuse_unwritable

    store = ResultStore(out)
    if not dry_run:
        refuse_unwritable(out)
    notify = notifier(quiet=quiet)
    with progress_bar(quiet=quiet) as update:
        what = plan(request, notify, update, dry=dry_run)
    if dry_run:
        _list_rows(what, find_known(what, store), as_json=as_json)
        return
    records = measure(what, out, quiet=quiet)
    print_records(records, as_json=as_json)
    refuse_failures(records)


def _list_rows(what: Plan, known: Known, *, as_json: bool) -> None:
    """Print which numbers of each target are still to be measured."""
    from ggtool.cli.console import stdout

    left = {
        target.label: [part for part in what.parts if part not in known[target]] for target in what.targets
    }
    if as_json:
        print(json.dumps([{"format": name, "to_do": tasks} for name, tasks in left.items()], indent=2))
        return
    for name, tasks in left.items():
        stdout().print(f"{name}: {'to do: ' + ', '.join(tasks) if tasks else 'kept'}", markup=False)
