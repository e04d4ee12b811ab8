"""Hugging Face checkpoint to GGUF, straight from its own precision, several quant types in one pass.

    plan(source, formats)        exact sizes and tensor types, no weight read
    convert(source, formats)     the files

Names, keys, their order and the choice of tensor types are llama.cpp's; nothing here imports torch.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ggtool.atomic import atomic_output, refuse_existing
from ggtool.convert.architectures import find_architecture, read_hparams
from ggtool.convert.header import encode, place
from ggtool.convert.metadata import collect, for_format
from ggtool.convert.tensor_types import choose
from ggtool.convert.tensors import ModelTensor, model_tensors
from ggtool.convert.vocab import read_vocabulary
from ggtool.convert.write import FileLayout, Progress, verify, write_files
from ggtool.environment import usable_cpus
from ggtool.errors import OutputError, UsageError
from ggtool.formats import Format
from ggtool.source import ModelSource

DEFAULT_FOLDER = Path("models")


@dataclass(frozen=True)
class Plan:
    """What a file of one quant type will be: sizes in bytes, and how many tensors get each tensor type."""

    format: Format
    n_bytes: int
    weights_bytes: int
    n_params: int
    tensor_types: Mapping[str, int]

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.weights_bytes / self.n_params


@dataclass(frozen=True)
class Converted:
    """A file that was made; `seconds` is the wall time of the whole call, all files together."""

    path: Path
    plan: Plan
    seconds: float


def default_path(name: str, row: Format, folder: Path = DEFAULT_FOLDER) -> Path:
    """Return where a model of this name goes: models/<name>-<QTYPE>.gguf."""
    return folder / f"{name}-{row.name}.gguf"


def plan(source: ModelSource, formats: Sequence[Format]) -> list[Plan]:
    """Return what `convert` would make of each format, without reading a weight."""
    _check_formats(formats)
    _, layouts = _prepare(source, formats)
    return [_describe(layout) for layout in layouts]


def convert(
    source: ModelSource,
    formats: Sequence[Format],
    out: Callable[[Format], Path] | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Converted]:
    """Write one GGUF file per format, all in one pass over the checkpoint, and return them in the order asked for.

    `out` names each file, by default `default_path`. Everything that can be known is checked before work begins:
    outputs that exist (unless `force`), free disk, the checkpoint's shape. A failure while converting leaves no
    file at all. The files get their names one after another at the very end; if another process took one of those
    names meanwhile, that one fails with OutputError, and files named before it stay, each whole.

    Raises UsageError, SourceError, OutputError or ArtifactError, each in one line.
    """
    started = time.monotonic()
    _check_formats(formats)
    paths = [out(row) if out else default_path(source.name, row) for row in formats]
    if len(set(paths)) != len(paths):
        raise UsageError("two quant types would go to the same file; leave --out away or name a folder.")
    for path in paths:
        refuse_existing(path, force=force)
    tensors, layouts = _prepare(source, formats)
    _check_space(paths, layouts)
    with ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_output(path, force=force)) for path in paths]
        outputs = list(zip(temporaries, layouts, strict=True))
        write_files(tensors, outputs, threads or usable_cpus(), progress)
        for temporary, layout in outputs:
            verify(temporary, layout)
    seconds = time.monotonic() - started
    return [Converted(path, _describe(layout), seconds) for path, layout in zip(paths, layouts, strict=True)]


def _check_formats(formats: Sequence[Format]) -> None:
    if not formats:
        raise UsageError("no quant type named; pass one with --qtype.")
    for row in formats:
        if row.container != "gguf":
            raise UsageError(f"{row.name} is no GGUF quant type; `ggtool formats` lists them.")
        if row.needs_imatrix:
            raise UsageError(f"{row.name} needs an importance matrix, which convert does not take yet.")


def _prepare(source: ModelSource, formats: Sequence[Format]) -> tuple[list[ModelTensor], list[FileLayout]]:
    row = find_architecture(source.config)
    hparams = read_hparams(row, source.config)
    tensors = model_tensors(row, hparams, source.weights)
    vocabulary = read_vocabulary(source.folder, source.config, int(hparams["n_vocab"]))
    values = collect(source, row, hparams, tensors, vocabulary)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    types = choose(values, shapes, formats)
    layouts = []
    for wanted in formats:
        placed = place((name, shape, types[wanted.name][name]) for name, shape in shapes.items())
        layouts.append(FileLayout(wanted, encode(for_format(values, wanted), placed), placed))
    return tensors, layouts


def _describe(layout: FileLayout) -> Plan:
    return Plan(
        format=layout.format,
        n_bytes=layout.n_bytes,
        weights_bytes=sum(tensor.n_bytes for tensor in layout.tensors),
        n_params=sum(tensor.n_params for tensor in layout.tensors),
        tensor_types=dict(Counter(tensor.type_name for tensor in layout.tensors).most_common()),
    )


def _check_space(paths: Sequence[Path], layouts: Sequence[FileLayout]) -> None:
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for path, layout in zip(paths, layouts, strict=True):
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        device = folder.stat().st_dev
        needed[device] += layout.n_bytes
        folders[device] = folder
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OutputError(
                f"{folder} has {free:,} bytes free and the files need {needed[device]:,}; free some space."
            )
