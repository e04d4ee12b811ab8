"""Make files on the nodes of a scheduler: GGUF files, one work a quant type, importance matrices, packed models.

A node is handed the checkpoint, makes the file in a scratch folder and hands it back. What cannot be made is a reason, and the
others are made all the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggtool.calibration.imatrix import calibrate
from ggtool.calibration.make_gguf import ConvertRequest, rounded
from ggtool.calibration.packed import Calibration, make_packed
from ggtool.conversion.convert import Converted, convert
from ggtool.conversion.options import Options
from ggtool.errors import GgtoolError, MeasureError
from ggtool.formats import Format, label
from ggtool.gguf.imatrix import write_imatrix
from ggtool.quantizers.pack_task import PackTask
from ggtool.source.lora import ADAPTER_NAMES
from ggtool.source.resolve import ModelSource
from ggtool.system.cache import cache_folder
from ggtool.system.schedule.work import Done, Files, Needs, Scheduler, Site, Watch, Work


@dataclass(frozen=True)
class GgufToMake:
    """A quant type of a checkpoint, for the driver's file `to`; paths are the driver's.

    rounding: the request that has its weights rounded with error feedback, None where llama.cpp rounds them.
    """

    source: ModelSource
    format: Format
    options: Options
    to: Path
    threads: int
    rounding: ConvertRequest | None = None


@dataclass(frozen=True)
class ImatrixToMake:
    """The importance matrix of a checkpoint over the text `data`, for the driver's file `to`.

    name: how the file calls the text.
    """

    source: ModelSource
    data: Path
    name: str
    to: Path
    threads: int
    n_chunks: int
    output: bool


@dataclass(frozen=True)
class PackedToMake:
    """A packed model that a calibration decides, for the driver's folder `task.out`."""

    task: PackTask
    calibration: Calibration


@dataclass(frozen=True)
class Spread:
    """Where files are made, and who is told how far they are."""

    scheduler: Scheduler
    watch: Watch

    def convert(
        self,
        source: ModelSource,
        paths: Mapping[Format, Path],
        options: Options,
        threads: int,
        rounding: ConvertRequest | None = None,
    ) -> dict[Format, Converted | GgtoolError]:
        """Make a GGUF file of each format and return what was made of it, or why it was not.

        rounding: as in `GgufToMake`.
        """
        files = files_of(source)
        if rounding is not None and rounding.calibration is not None:
            text = rounding.calibration.absolute()
            rounding = replace(rounding, calibration=text)
            files = (*files, Files(text))
        works = {
            fmt: Work(
                f"convert {fmt.name}",
                f"{fmt.name}: converting",
                "ggtool.calibration.spread:make_gguf",
                GgufToMake(_named(source), fmt, options, path.absolute(), threads, rounding),
                Needs(threads),
                files,
            )
            for fmt, path in paths.items()
        }
        ends = self._run(list(works.values()))
        return {
            fmt: replace(ends[work.key], path=paths[fmt])
            if isinstance(ends[work.key], Converted)
            else ends[work.key]
            for fmt, work in works.items()
        }

    def imatrix(
        self, source: ModelSource, data: Path, to: Path, *, threads: int, n_chunks: int, output: bool = False
    ) -> None:
        """Compute an importance matrix on one node, into the file `to`. MeasureError where it cannot be."""
        text = data.absolute()
        work = Work(
            "imatrix",
            "importance matrix",
            "ggtool.calibration.spread:make_imatrix",
            ImatrixToMake(_named(source), text, str(data), to.absolute(), threads, n_chunks, output),
            Needs(threads),
            (*files_of(source), Files(text)),
        )
        end = self._run([work])[work.key]
        if isinstance(end, GgtoolError):
            raise end

    def pack(self, tasks: Sequence[PackTask], calibration: Calibration) -> dict[Path, GgtoolError | None]:
        """Make packed models; return by folder why one could not be made, None where it was."""
        works = {
            task.out: Work(
                f"pack {task.out.name}",
                f"{label(task.format.backend, task.components)}: calibrating",
                "ggtool.calibration.spread:pack",
                PackedToMake(replace(task, source=_named(task.source), out=task.out.absolute()), calibration),
                Needs(task.threads, gpus=1.0 if task.device == "cuda" else 0.0),
                files_of(task.source),
            )
            for task in tasks
        }
        ends = self._run(list(works.values()))
        return {out: ends[work.key] for out, work in works.items()}

    def _run(self, works: Sequence[Work]) -> dict[str, Any]:
        """Run works and return each one's result or error by its key."""
        return {done.work.key: _end(done) for done in self.scheduler.run(works, self.watch)}


def files_of(source: ModelSource) -> tuple[Files, ...]:
    """Return the files of this machine that a checkpoint is made of, with an adapter's where one is merged."""
    named = _named(source)
    found = [Files(named.folder, source.file_names)]
    if named.adapter is not None:
        names = tuple(name for name in ADAPTER_NAMES if (named.adapter / name).is_file())
        found.append(Files(named.adapter, names))
    return tuple(found)


def make_gguf(task: GgufToMake, site: Site) -> Converted:
    """Convert on this node and hand the file to the driver. Raises what `ggtool.conversion.convert.convert` raises."""

    def told(done: int, total: int, _: str) -> None:
        site.progress("converting", done >> 20, total >> 20)

    source, options = placed(task.source, site), task.options
    if task.rounding is not None and task.rounding.calibration is not None:
        request = replace(task.rounding, calibration=site.place(task.rounding.calibration))
        options = rounded(request, source, task.format, options, task.threads, site.progress)
    with _scratch() as folder:
        made = convert(
            source,
            [task.format],
            lambda _: folder / task.to.name,
            options=options,
            threads=task.threads,
            progress=told,
        )
        site.deliver(folder / task.to.name, task.to)
        return made[0]


def make_imatrix(task: ImatrixToMake, site: Site) -> None:
    """Compute an importance matrix on this node and hand its file to the driver."""
    made = calibrate(
        placed(task.source, site),
        site.place(task.data),
        task.threads,
        n_chunks=task.n_chunks,
        output=task.output,
        progress=site.progress,
    )
    # The matrix names its text, which has another path here.
    with _scratch() as folder:
        write_imatrix(folder / task.to.name, replace(made, datasets=(task.name,)))
        site.deliver(folder / task.to.name, task.to)


def pack(task: PackedToMake, site: Site) -> None:
    """Quantize on this node as a calibration decides and hand the folder to the driver."""
    with _scratch() as folder:
        here = replace(
            task.task, source=placed(task.task.source, site), out=folder / task.task.out.name, force=True
        )
        make_packed(here, task.calibration, lambda done, total: site.progress("calibrating", done, total))
        site.deliver(here.out, task.task.out)


def placed(source: ModelSource, site: Site) -> ModelSource:
    """Return a checkpoint as it lies on this node."""
    adapter = None if source.adapter is None else site.place(source.adapter)
    return replace(source, folder=site.place(source.folder), adapter=adapter)


def _named(source: ModelSource) -> ModelSource:
    """Return a checkpoint by absolute paths, without what was opened of it."""
    adapter = None if source.adapter is None else source.adapter.resolve()
    return replace(source, folder=source.folder.resolve(), adapter=adapter)


def _end(done: Done) -> Any:
    return MeasureError(done.failure) if done.failure else done.result


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a folder on the disk of this node's cache, which has room for models."""
    folder = cache_folder() / "copies"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as name:
        yield Path(name)
