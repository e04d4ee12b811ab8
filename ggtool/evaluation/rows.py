"""Rows of a plan as works for a scheduler: one work for each number group of each target, run where its files are brought to.

What a row needs of a node is known before it runs: quality takes its threads' CPUs, or a part of a GPU, and shares a node;
speed and memory have a node to themselves, or on a node of several GPUs as many of them as they use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggtool.calibration.spread import placed
from ggtool.conversion.convert import convert
from ggtool.evaluation.jobs import ModelJob, ModelToOpen
from ggtool.evaluation.plan import Plan
from ggtool.formats import Format
from ggtool.source.resolve import ModelSource
from ggtool.system import worker
from ggtool.system.schedule.work import Files, Needs, Node, Site
from ggtool.system.worker import Outcome

RUN_ROW = "ggtool.evaluation.rows:run_row"
# Made at the speed of a disk, and larger than what takes time to make: a node that has the checkpoint makes them.
MADE_ANYWHERE = frozenset({"F32", "F16", "BF16", "Q8_0"})
# Python, torch and a runtime, before a model is opened.
_LIBRARIES_BYTES = 600 << 20
# GPUs are handed out in such parts.
_GPU_PARTS = 4


@dataclass(frozen=True)
class Row:
    """A job with paths of the driver's machine, its time limit, and the checkpoint of a GGUF file that a node may make."""

    job: worker.Job
    timeout_s: float | None = None
    source: ModelSource | None = None


def run_row(row: Row, site: Site) -> Outcome:
    """Do a row's job in a child process on this node. Raises what `ggtool.system.worker.run` raises."""
    job = row.job
    if row.source is not None and isinstance(job, ModelJob):
        local = placed(row.source, site)
        fmt, path = job.model.format, job.model.path

        def told(done: int, total: int, _: str) -> None:
            site.progress("making", done, total)

        def make(to: Path) -> None:
            convert(local, [fmt], lambda _: to, threads=job.threads, progress=told)

        site.place(path, make)

    def relay(done: int, total: int) -> None:
        site.progress(job.task, done, total)

    return worker.run(_relocated(job, site), relay, row.timeout_s)


def row_of(what: Plan, job: worker.Job, timeout_s: float | None) -> Row:
    """Return a job as a row; a GGUF file that is quickly made may be made where the checkpoint is needed anyway."""
    source = what.source
    if source is None or not isinstance(job, ModelJob) or not _is_made_anywhere(what, job.model):
        return Row(job, timeout_s)
    folder = source.folder.resolve()
    needs_checkpoint = any(path == folder for path in _paths(job))
    return Row(job, timeout_s, replace(source, folder=folder) if needs_checkpoint else None)


def files_of(what: Plan, job: worker.Job) -> tuple[Files, ...]:
    """Return the files that a job reads."""
    checkpoint = None if what.source is None else what.source.folder.resolve()
    found = []
    for path in dict.fromkeys(_paths(job)):
        if what.source is not None and path == checkpoint:
            found.append(Files(path, what.source.file_names))
        elif path.is_dir():
            found.append(Files(path, tuple(sorted(one.name for one in path.iterdir() if one.is_file()))))
        else:
            found.append(Files(path))
    return tuple(found)


def needs_of(what: Plan, job: worker.Job, *, alone: bool, kind: str, nodes: Sequence[Node]) -> Needs:
    """Return what a job takes of one of the nodes; kind: where it must run.

    On GPUs, counted by the smallest: what its models take of one, and no more CPUs than belong to that part, for its threads mostly wait.
    What is to be alone has whole GPUs, and what runs on a node's other GPUs is noted in its record.
    """
    n_bytes = _LIBRARIES_BYTES + sum(_loaded_bytes(what, model) for model in _models(job))
    cpus, gpus, has_node = job.threads, 0.0, alone
    if what.device == "cuda":
        gpu_bytes = min((node.facts.gpu_bytes for node in nodes if node.gpus), default=0)
        share = 1.0 if alone or not gpu_bytes else n_bytes / gpu_bytes
        gpus = len(what.request.gpus) or min(1.0, math.ceil(share * _GPU_PARTS) / _GPU_PARTS)
        has_node = alone and all(node.gpus <= gpus for node in nodes)
        belonging = min((node.cpus / node.gpus for node in nodes if node.gpus), default=cpus)
        cpus = max(1, min(cpus, int(belonging * gpus)))
    return Needs(cpus, gpus, n_bytes, has_node, kind if alone else "")


def _is_made_anywhere(what: Plan, model: ModelToOpen) -> bool:
    """Whether a file is a function of the checkpoint alone, and one that ggtool made in its cache."""
    named = {
        Path(name).expanduser().resolve() for name in what.request.backends if name.lower().endswith(".gguf")
    }
    return model.format.container == "gguf" and model.format.name in MADE_ANYWHERE and model.path not in named


def _loaded_bytes(what: Plan, model: ModelToOpen) -> int:
    """Return about how much memory an open model takes: a file's size, or its weights in float32."""
    if model.path.is_file():
        return model.path.stat().st_size
    if what.source is not None and model.path == what.source.folder.resolve():
        return 4 * sum(math.prod(tensor.shape) for tensor in what.source.weights.values())
    if not model.path.is_dir():
        return 0  # gone since it was planned, which the child that opens it will say
    return sum(path.stat().st_size for path in model.path.iterdir() if path.is_file())


def _models(job: Any) -> Iterable[ModelToOpen]:
    return [value for value in _values(job) if isinstance(value, ModelToOpen)]


def _paths(job: Any) -> list[Path]:
    return [value for value in _values(job) if isinstance(value, Path)]


def _values(value: Any) -> Iterator[Any]:
    yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Format):
        for field in dataclasses.fields(value):
            yield from _values(getattr(value, field.name))


def _relocated(value: Any, site: Site) -> Any:
    """Return a job with the paths that its files have on this node."""
    if isinstance(value, Path):
        return site.place(value).resolve()
    if not dataclasses.is_dataclass(value) or isinstance(value, type | Format):
        return value
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    moved = {name: _relocated(part, site) for name, part in parts.items()}
    return replace(value, **{name: part for name, part in moved.items() if part is not parts[name]})
