"""Compute an importance matrix whose tokens count by how much the predictions depend on them, in llama.cpp's file format."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file

from ggtool.calibration.jobs import GradientJob
from ggtool.calibration.packed import read_calibration
from ggtool.gguf.imatrix import Entry, ImportanceMatrix
from ggtool.source.resolve import ModelSource
from ggtool.system import worker
from ggtool.system.progress import StageProgress


def compute_gradient_imatrix(
    source: ModelSource,
    data: Path,
    *,
    n_ctx: int,
    n_chunks: int,
    output: bool,
    device: Literal["cpu", "cuda"],
    threads: int,
    progress: StageProgress,
) -> ImportanceMatrix:
    """Run the checkpoint `source` over chunks of the text file `data` in torch; each token counts by its squared gradients.

    0 chunks is all of the text. Raises MeasureError with the reason when the child cannot do it, UsageError for a text too short.
    """
    calibration = read_calibration(source, data, n_chunks, n_tokens=n_ctx)
    with tempfile.TemporaryDirectory(prefix="ggtool-calibrate-") as folder:
        chunks, out = Path(folder) / "chunks.npy", Path(folder) / "sums.safetensors"
        np.save(chunks, calibration.chunks)
        job = GradientJob(
            source=replace(source, folder=source.folder.resolve()),
            chunks=chunks,
            output=output,
            out=out,
            threads=threads,
            device=device,
        )
        worker.run(job, lambda done, total: progress("calibrating", done, total))
        sums = load_file(out)
    count = np.array([calibration.chunks.size])
    entries = {name: Entry(values[None], count) for name, values in sums.items()}
    return ImportanceMatrix("", entries, (str(data),), len(calibration.chunks), calibration.chunks.shape[1])
