"""Cached model files: GGUF, and packed models that depend on a calibration text.

The cache is keyed by the checkpoint's content and the code that makes the files. GGUF files are converted in one
pass over the checkpoint, those with an importance matrix (`gguf-iq2_xs+imatrix`) in a second one, under names that
hold the matrix's sha256. A file that cannot be made is a MadeFile with the reason; the others are made all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ggtool.calibration.imatrix import cached_imatrix, calibrate
from ggtool.calibration.packed import Calibration, cached_packed, make_packed, read_calibration
from ggtool.calibration.spread import Spread
from ggtool.conversion.cached import gguf_folder
from ggtool.conversion.convert import convert
from ggtool.conversion.options import Options
from ggtool.conversion.recipe import imatrix_sha256
from ggtool.errors import ArtifactError, GgtoolError, OutputError, UsageError
from ggtool.formats import Format, label
from ggtool.gguf.imatrix import ImportanceMatrix, read_imatrix
from ggtool.quantizers.format_spec import WITH_IMATRIX, Spec
from ggtool.quantizers.pack_task import PackTask
from ggtool.quantizers.saved_folder import folder_sha256
from ggtool.source.resolve import ModelSource
from ggtool.system.files import file_sha256
from ggtool.system.progress import StageProgress


@dataclass(frozen=True)
class Making:
    """How files are made: the text that calibrates, its chunks (None is the default, 0 all), where to compute.

    spread: the nodes that make them; None is this machine.
    """

    calibration: str | None
    calibration_chunks: int | None
    device: Literal["cpu", "cuda"]
    threads: int
    spread: Spread | None = None


@dataclass(frozen=True)
class MadeFile:
    """A file or folder of the cache and its sha256, which is empty if it is not there; why it could not be made."""

    path: Path
    sha256: str
    failure: GgtoolError | None = None


def make_files(
    source: ModelSource, specs: Sequence[Spec], how: Making, progress: StageProgress, *, dry: bool
) -> dict[Spec, MadeFile]:
    """Return the file of each spec that needs one; unless dry, make those that the cache does not hold yet.

    Raises UsageError for a calibration text that cannot be used, OutputError where the disk is full or the cache not writable.
    """
    wanted = [spec for spec in specs if isinstance(spec.what, Format) and spec.what.container == "gguf"]
    plain = [spec for spec in wanted if not spec.imatrix]
    weighted = [spec for spec in wanted if spec.imatrix]
    found = _convert(source, plain, None, how, progress, dry=dry) if plain else {}
    if weighted:
        imatrix = _imatrix(source, how, progress, dry=dry)
        found |= _convert(source, weighted, imatrix, how, progress, dry=dry)
    return found | _pack(source, specs, how, progress, dry=dry)


def _imatrix(
    source: ModelSource, how: Making, progress: StageProgress, *, dry: bool
) -> ImportanceMatrix | None:
    assert how.calibration is not None
    data, n_chunks = Path(how.calibration).expanduser(), how.calibration_chunks or 0
    path = cached_imatrix(source, data, n_chunks=n_chunks)
    if dry:
        return read_imatrix(path) if path.exists() else None
    if how.spread is not None and not path.exists():
        how.spread.imatrix(source, data, path, threads=how.threads, n_chunks=n_chunks)
    return calibrate(source, data, how.threads, n_chunks=n_chunks, progress=progress)


def _convert(
    source: ModelSource,
    specs: Sequence[Spec],
    imatrix: ImportanceMatrix | None,
    how: Making,
    progress: StageProgress,
    *,
    dry: bool,
) -> dict[Spec, MadeFile]:
    """Return the cache's file of each spec, made with `imatrix`; here the missing ones in one pass over the checkpoint."""
    formats = {spec: spec.what for spec in specs if isinstance(spec.what, Format)}
    suffix = f"{WITH_IMATRIX}-{imatrix_sha256(imatrix)[:16]}" if imatrix is not None else ""
    folder = gguf_folder(source)
    paths = {fmt: folder / f"{source.name}-{fmt.name}{suffix}.gguf" for fmt in formats.values()}
    missing = {fmt: path for fmt, path in paths.items() if not path.exists()}

    def attempt(some: Sequence[Format]) -> GgtoolError | None:
        try:
            convert(
                source,
                some,
                missing.__getitem__,
                options=Options(imatrix=imatrix),
                force=True,
                threads=how.threads,
                progress=lambda done, total, _: progress("converting", done, total),
            )
        except OutputError:
            raise
        except GgtoolError as error:
            return error
        return None

    failures: dict[Format, GgtoolError | None] = {}
    if missing and not dry and how.spread is not None:
        made = how.spread.convert(source, missing, Options(imatrix=imatrix), how.threads)
        failures = {fmt: end for fmt, end in made.items() if isinstance(end, GgtoolError)}
    elif missing and not dry:
        failure = attempt(list(missing))
        if isinstance(failure, UsageError | ArtifactError) and len(missing) > 1:
            failures = {fmt: attempt([fmt]) for fmt in missing}  # one format fails the pass of all
        else:
            failures = dict.fromkeys(missing, failure)
    return {spec: _made(paths[fmt], failures.get(fmt)) for spec, fmt in formats.items()}


def _pack(
    source: ModelSource, specs: Sequence[Spec], how: Making, progress: StageProgress, *, dry: bool
) -> dict[Spec, MadeFile]:
    """Return the packed folder of each spec that a calibration decides; unless dry, make those that are missing."""
    wanted = {spec: spec.what for spec in specs if isinstance(spec.what, Format) and spec.what.method}
    if not wanted:
        return {}
    assert how.calibration is not None
    calibration = read_calibration(source, Path(how.calibration).expanduser(), how.calibration_chunks)
    tasks = {
        spec: PackTask(
            source,
            fmt,
            spec.components,
            cached_packed(source, fmt, spec.components, calibration),
            how.device,
            how.threads,
        )
        for spec, fmt in wanted.items()
    }
    missing = [] if dry else [task for task in tasks.values() if not task.out.exists()]
    if how.spread is not None:
        failures = how.spread.pack(missing, calibration)
    else:
        failures = {task.out: _packed_here(task, calibration, progress) for task in missing}
    return {spec: _made(task.out, failures.get(task.out)) for spec, task in tasks.items()}


def _packed_here(task: PackTask, calibration: Calibration, progress: StageProgress) -> GgtoolError | None:
    """Make a packed model in this machine's cache; return why it could not be made."""
    stage = f"calibrating {label(task.format.backend, task.components)}"
    try:
        make_packed(task, calibration, partial(progress, stage))
    except OutputError:
        raise
    except GgtoolError as error:
        return error
    return None


def _made(path: Path, failure: GgtoolError | None) -> MadeFile:
    return MadeFile(path, _sha256(path) if path.exists() else "", failure)


def _sha256(path: Path) -> str:
    return folder_sha256(path) if path.is_dir() else file_sha256(path)
