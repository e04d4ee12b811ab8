"""Compute an importance matrix: run a GGUF over a text with llama.cpp and write the sums in llama.cpp's file format."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ggtool.backends import LoadOptions
from ggtool.calibration.cached import gguf_calibration_folder
from ggtool.conversion.cached import gguf_folder
from ggtool.conversion.convert import convert
from ggtool.errors import UsageError
from ggtool.formats import find_qtype
from ggtool.gguf.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import StageProgress

CHUNK_TOKENS = 512


def compute_imatrix(
    model: Path,
    data: Path,
    options: LoadOptions,
    *,
    n_chunks: int = 0,
    output: bool = False,
    progress: StageProgress | None = None,
) -> ImportanceMatrix:
    """Run the GGUF at `model` over chunks of options.n_ctx tokens of the text file `data`; 0 chunks is all of it.

    Raises what `ggtool.backends.llama_cpp.imatrix.collect_inputs` raises, and UsageError for a file that is not text.
    """
    # llama_cpp takes 0.15 s to import, which a conversion without calibration need not spend.
    from ggtool.backends.llama_cpp.imatrix import collect_inputs

    found, n_chunks = collect_inputs(
        model,
        read_text(data),
        options,
        n_chunks=n_chunks,
        output=output,
        progress=None if progress is None else lambda done, total: progress("calibrating", done, total),
    )
    entries = {name: Entry(item.sums.astype(np.float32), item.counts) for name, item in found.items()}
    return ImportanceMatrix("", entries, (str(data),), n_chunks, options.n_ctx)


def calibrate(
    source: ModelSource,
    data: Path,
    threads: int,
    *,
    n_ctx: int = CHUNK_TOKENS,
    n_chunks: int = 0,
    output: bool = False,
    progress: StageProgress | None = None,
) -> ImportanceMatrix:
    """Return the importance matrix of a checkpoint at its own precision over `data`, from the cache if it is there.

    Chunks have n_ctx tokens, or as many as the model was trained on if that is less.
    The model runs as a GGUF of the checkpoint's precision, F32 or BF16, which stays in the cache too.
    """
    path = cached_imatrix(source, data, n_ctx=n_ctx, n_chunks=n_chunks, output=output)
    if not path.exists():
        model = full_precision(source, threads, progress)
        header = read_header(model)
        trained = header.metadata.get(f"{header.architecture}.context_length", n_ctx)
        options = LoadOptions(min(n_ctx, trained), threads)
        made = compute_imatrix(model, data, options, n_chunks=n_chunks, output=output, progress=progress)
        write_imatrix(path, made, force=True)
    # The name is written into every file made with it; the cache's path should not be.
    return replace(read_imatrix(path), name=path.name)


def cached_imatrix(
    source: ModelSource, data: Path, *, n_ctx: int = CHUNK_TOKENS, n_chunks: int = 0, output: bool = False
) -> Path:
    """Return where the cache has, or will have, the importance matrix that `calibrate` makes."""
    digest = hashlib.sha256(f"{n_ctx} {n_chunks} {output} {read_text(data)}".encode())
    return gguf_calibration_folder(source) / f"{source.name}-{digest.hexdigest()[:16]}-imatrix.gguf"


def full_precision(source: ModelSource, threads: int, progress: StageProgress | None = None) -> Path:
    """Return the checkpoint as a GGUF in its own precision, from the cache or made now."""
    narrow = all(tensor.dtype == "BF16" for tensor in source.weights.values())
    row = find_qtype("bf16" if narrow else "f32")
    path = gguf_folder(source) / f"{source.name}-{row.name}.gguf"
    if not path.exists():
        convert(
            source,
            [row],
            lambda _: path,
            force=True,
            threads=threads,
            progress=None if progress is None else lambda done, total, _: progress("converting", done, total),
        )
    return path


def read_text(path: Path) -> str:
    """Read a calibration text; UsageError for a file that is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not UTF-8 text; convert it, for example with `iconv -t utf-8`."
        ) from None
    return text.removesuffix("\n")  # as llama.cpp's tools read a file
