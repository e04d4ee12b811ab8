"""Convert a Hugging Face checkpoint to GGUF: from its original precision, several quant types in one pass.

    plan(source, formats)        exact sizes and tensor types, no weight read
    plan_tensors(source, format) the same of each tensor
    convert(source, formats)     the files

Names, keys, their order and the choice of tensor types are llama.cpp's; nothing here imports torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ggtool.conversion.layout import Design, choose_types, lay_out
from ggtool.conversion.model import read_model
from ggtool.conversion.options import NO_OPTIONS, Options
from ggtool.conversion.tensors import ModelTensor
from ggtool.conversion.write import FileLayout, FileProgress, verify, write_files
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.gguf.model import part_paths
from ggtool.source.resolve import ModelSource
from ggtool.system.atomic import atomic_output, refuse_existing
from ggtool.system.disk import check_space
from ggtool.system.machine import usable_cpus

DEFAULT_FOLDER = Path("models")


@dataclass(frozen=True)
class FilePlan:
    """What a file of one quant type will be: sizes in bytes, all parts together, and tensors by tensor type.

    `notes` are warnings for the user, such as tensors that the importance matrix does not cover.
    """

    format: Format
    n_bytes: int
    weights_bytes: int
    n_params: int
    tensor_types: Mapping[str, int]
    n_ctx: int
    kv_cache_bytes: int
    n_parts: int = 1
    notes: tuple[str, ...] = ()

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; 0 for a file without tensors."""
        return 8 * self.weights_bytes / self.n_params if self.n_params else 0.0

    @property
    def run_bytes(self) -> int:
        """Memory to run it: the weights, and the KV cache at n_ctx tokens."""
        return self.weights_bytes + self.kv_cache_bytes


@dataclass(frozen=True)
class Converted:
    """A file that was made, or the first of its parts; `seconds` is the wall time of the whole call."""

    path: Path
    plan: FilePlan
    seconds: float


def default_path(name: str, row: Format, folder: Path = DEFAULT_FOLDER) -> Path:
    """Return where a model of this name goes: models/<name>-<QTYPE>.gguf."""
    return folder / f"{name}-{row.name}.gguf"


def plan(source: ModelSource, formats: Sequence[Format], options: Options = NO_OPTIONS) -> list[FilePlan]:
    """Return what `convert` would make of each format, without reading a weight.

    Types that need an importance matrix are described as if there were one.
    """
    _check_formats(formats)
    _, design = _prepare(source, formats, options, shapes_only=True)
    return _describe(design)


def plan_tensors(
    source: ModelSource, fmt: Format, options: Options = NO_OPTIONS
) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape (numpy's order) and tensor type of each tensor of the file, without reading a weight."""
    _check_formats([fmt])
    _, design = _prepare(source, [fmt], options, shapes_only=True)
    return [
        (tensor.name, tensor.shape, tensor.type_name) for part in design.parts[0] for tensor in part.tensors
    ]


def convert(
    source: ModelSource,
    formats: Sequence[Format],
    out: Callable[[Format], Path] | None = None,
    *,
    options: Options = NO_OPTIONS,
    force: bool = False,
    threads: int | None = None,
    progress: FileProgress | None = None,
) -> list[Converted]:
    """Write one GGUF file per format, all in one pass over the checkpoint, and return them in the order asked for.

    `out` names each file, by default `default_path`; a split one becomes NAME-00001-of-00003.gguf and so on.
    Everything that can be known is checked before work begins: outputs that exist (unless `force`), free disk, the
    checkpoint's shapes, missing importance data. A failure during conversion leaves no files. Files are renamed into
    place one after another at the end; if another process has taken a name by then, that file fails with OutputError
    and those already in place stay, each complete.

    Raises UsageError, SourceError, OutputError or ArtifactError, each in one line.
    """
    started = time.monotonic()
    _check_formats(formats)
    _check_imatrix(formats, options)
    paths = [out(row) if out else default_path(source.name, row) for row in formats]
    if len(set(paths)) != len(paths):
        raise UsageError("two quant types would go to the same file; leave --out away or name a folder.")
    if options.split_max_bytes is None:
        for path in paths:
            refuse_existing(path, force=force)
    tensors, design = _prepare(source, formats, options, progress)
    named = [part_paths(path, len(parts)) for path, parts in zip(paths, design.parts, strict=True)]
    outputs = list(zip(chain(*named), chain(*design.parts), strict=True))
    for path, _ in outputs:
        refuse_existing(path, force=force)
    check_space({path: layout.n_bytes for path, layout in outputs})
    _write(
        tensors, outputs, design, options, force=force, threads=threads or usable_cpus(), progress=progress
    )
    seconds = time.monotonic() - started
    return [Converted(parts[0], what, seconds) for parts, what in zip(named, _describe(design), strict=True)]


def _write(
    tensors: Sequence[ModelTensor],
    outputs: Sequence[tuple[Path, FileLayout]],
    design: Design,
    options: Options,
    *,
    force: bool,
    threads: int,
    progress: FileProgress | None,
) -> None:
    with ExitStack() as stack:
        # Contexts exit in reverse order, so the first part of a split model appears after all others.
        files = [(stack.enter_context(atomic_output(path, force=force)), layout) for path, layout in outputs]
        write_files(tensors, files, threads, progress, design.importance, options.rounded)
        for temporary, layout in files:
            verify(temporary, layout)


def _check_formats(formats: Sequence[Format]) -> None:
    if not formats:
        raise UsageError("no quant type named; pass one with --qtype.")
    for row in formats:
        if row.container != "gguf":
            raise UsageError(f"{row.name} is not a GGUF quant type; `ggtool formats` lists them.")


def _check_imatrix(formats: Sequence[Format], options: Options) -> None:
    # With other rules or a recipe only `lay_out` knows whether any tensor needs it, and checks there.
    as_it_is = options.rules == NO_OPTIONS.rules and options.recipe is None
    for row in formats:
        if row.needs_imatrix and options.imatrix is None and as_it_is:
            raise UsageError(
                f"{row.name} needs an importance matrix: pass --imatrix FILE, or --calibration TEXT to compute one."
            )


def _prepare(
    source: ModelSource,
    formats: Sequence[Format],
    options: Options,
    progress: FileProgress | None = None,
    *,
    shapes_only: bool = False,
) -> tuple[list[ModelTensor], Design]:
    model = read_model(source, progress, shapes_only=shapes_only or options.vocab_only)
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    with ThreadPoolExecutor(1) as pool:
        # llama.cpp chooses the types in a child process while this one reads the vocabulary.
        types = pool.submit(choose_types, model.facts, shapes, formats, options, dry=shapes_only)
        values = model.values
    design = lay_out(values, shapes, types.result(), formats, options, dry=shapes_only, notes=model.notes)
    return ([] if options.vocab_only else model.tensors), design


def _describe(design: Design) -> list[FilePlan]:
    plans = []
    for parts in design.parts:
        tensors = [tensor for part in parts for tensor in part.tensors]
        plans.append(
            FilePlan(
                format=parts[0].format,
                n_bytes=sum(part.n_bytes for part in parts),
                weights_bytes=sum(tensor.n_bytes for tensor in tensors),
                n_params=sum(tensor.n_params for tensor in tensors),
                tensor_types=dict(Counter(tensor.type_name for tensor in tensors).most_common()),
                n_ctx=design.n_ctx,
                kv_cache_bytes=design.kv_cache_bytes,
                n_parts=len(parts),
                notes=design.notes,
            )
        )
    return plans
