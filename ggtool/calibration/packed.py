"""Packed models made with calibration: the text is cut here, a child process quantizes, the cache keeps the result.

Quality, speed and memory are each measured in a process of its own, and all load the same packed model.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggtool import corpus
from ggtool.calibration.cached import packed_folder
from ggtool.calibration.imatrix import read_text
from ggtool.calibration.jobs import PackJob
from ggtool.corpus import TokenIds
from ggtool.errors import UsageError
from ggtool.formats import Format, label
from ggtool.quantizers.pack_task import PackTask
from ggtool.source.resolve import ModelSource
from ggtool.system import worker
from ggtool.system.progress import Progress

DEFAULT_CHUNKS = 128
CHUNK_TOKENS = 1024
# Too short to calibrate reliably.
_LEAST_TOKENS = 32


@dataclass(frozen=True)
class Calibration:
    """Token ids (n_chunks, n_ctx) that a model is calibrated on, and the sha256 of the text they are from."""

    chunks: TokenIds
    text_sha256: str

    @property
    def sha256(self) -> str:
        """The sha256 of the ids and their shape."""
        digest = hashlib.sha256(repr(self.chunks.shape).encode())
        digest.update(self.chunks.astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a saved model records about its calibration text."""
        return {
            "text_sha256": self.text_sha256,
            "n_chunks": len(self.chunks),
            "n_ctx": self.chunks.shape[1],
        }


def read_calibration(
    source: ModelSource,
    data: Path,
    n_chunks: int | None = None,
    *,
    default: int = DEFAULT_CHUNKS,
    n_tokens: int = CHUNK_TOKENS,
) -> Calibration:
    """Cut the text file `data` into chunks of `n_tokens`, or as many as the model was trained on if that is less.

    n_chunks: how many, spread evenly over the text, None for `default`, 0 for all there are; of a short text, all there are.
    Raises UsageError for a file that is no text, or one too short.
    """
    text = read_text(data)
    tokens = corpus.tokenize(text, source)
    total = len(tokens.ids)
    if total < _LEAST_TOKENS:
        raise UsageError(
            f"{data} has {total} tokens, too few to calibrate on; give a text of at least {_LEAST_TOKENS} tokens."
        )
    n_ctx = min(n_tokens, _trained_n_ctx(source), total)
    wanted = default if n_chunks is None else n_chunks
    available = total // n_ctx
    count = min(wanted or available, available)
    starts = np.linspace(0, total - n_ctx, count).astype(int) if count > 1 else [0]
    chunks = np.stack([tokens.ids[start : start + n_ctx] for start in starts])
    if tokens.bos is not None:
        chunks[:, 0] = tokens.bos
    return Calibration(chunks, hashlib.sha256(text.encode()).hexdigest())


def cached_packed(source: ModelSource, fmt: Format, components: str, calibration: Calibration) -> Path:
    """Return where the cache has, or will have, the packed model that `make_packed` makes."""
    name = f"{source.name}-{label(fmt.backend, components).replace(':', '-')}"
    return packed_folder(source) / f"{name}-{calibration.sha256[:16]}"


def make_packed(
    task: PackTask, calibration: Calibration, progress: Progress = lambda done, total: None
) -> None:
    """Quantize a checkpoint as the task says, in a child, and save it; progress counts blocks.

    Raises MeasureError with the reason when the child cannot do it, OutputError as `save_quantized` does.
    """
    with tempfile.TemporaryDirectory(prefix="ggtool-calibrate-") as folder:
        chunks = Path(folder) / "chunks.npy"
        np.save(chunks, calibration.chunks)
        job = PackJob(
            format=task.format,
            components=task.components,
            source=task.source.folder.resolve(),
            chunks=chunks,
            threads=task.threads,
            device=task.device,
            out=task.out.resolve(),
            facts=task.facts({"name": task.format.method, **calibration.facts}),
            force=task.force,
        )
        worker.run(job, progress)


def _trained_n_ctx(source: ModelSource) -> int:
    config = source.config.get("text_config") or source.config
    trained = config.get("max_position_embeddings") or config.get("n_positions")
    return int(trained) if trained else CHUNK_TOKENS
