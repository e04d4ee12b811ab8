"""Round a checkpoint for a GGUF file in a child process, with what was finished kept in the cache: a second run goes on from there."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from ggtool.calibration.cached import rounded_folder
from ggtool.calibration.gguf_gptq.stored import StoredTensors
from ggtool.calibration.jobs import GgufSurveyJob, RoundJob
from ggtool.calibration.packed import Calibration
from ggtool.conversion.architectures import find_architecture
from ggtool.errors import UsageError
from ggtool.gguf.imatrix import ImportanceMatrix
from ggtool.gguf.model import Artifact
from ggtool.gguf.rounded_types import ROUNDED_TYPES
from ggtool.source.resolve import ModelSource
from ggtool.system import worker
from ggtool.system.atomic import atomic_output
from ggtool.system.files import file_sha256, read_json
from ggtool.system.progress import Progress

# Of the calibration text, unless --calibration-chunks says otherwise.
DEFAULT_CHUNKS = 128
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class RoundedModel:
    """Tensors for the writer, by GGUF name: the bytes of matrices (uint8), and biases (float32); facts on each matrix."""

    tensors: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Mapping[str, Any]]

    @property
    def n_improved(self) -> int:
        """The number of matrices that are not as llama.cpp, or the file before, had them."""
        return sum(bool(one["improved"]) for one in self.facts.values())

    @property
    def relative_error(self) -> float:
        """The geometric mean over matrices of our output error over that before, on text that was not fitted on."""
        ratios = [
            min(one["error"] / one["error_before"], 1.0)
            for one in self.facts.values()
            if one["error_before"] > 0
        ]
        return float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-12))))) if ratios else 1.0


def recipe(calibration: Calibration, made: RoundedModel) -> str:
    """Return in few words what went into a file, the most telling first: there may be no room for all."""
    n_chunks, n_ctx = calibration.chunks.shape
    return (
        f"error {made.relative_error:.3f}, {made.n_improved}/{len(made.facts)} matrices, {n_chunks}x{n_ctx} tokens, "
        f"text {calibration.text_sha256[:16]}"
    )


def check_source(source: ModelSource) -> None:
    """Raise UsageError for a checkpoint that the method cannot be used on."""
    if find_architecture(source.config) is None:
        raise UsageError(
            f"error feedback knows ggtool's own architectures (`ggtool formats --architectures`), and {source.name} is not of one."
        )
    if not source.is_plain:
        raise UsageError(
            f"error feedback starts from plain float weights, and those of {source.name} are packed or an adapter's."
        )


def survey_model(
    source: ModelSource,
    types: Mapping[str, Sequence[str]],
    imatrix: ImportanceMatrix | None,
    calibration: Calibration,
    *,
    device: Literal["cpu", "cuda"],
    threads: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Return {tensor: {tensor type: expected divergence in nats}} of the matrices that are rounded here, out of the cache if it is there.

    types: what a tensor might become; the divergence is measured with the first of them. Raises MeasureError as `round_model` does.
    """
    check_source(source)
    importance = _importance(imatrix, types)
    digest = _digest({name: list(kinds) for name, kinds in types.items()}, importance, calibration)
    path = rounded_folder(source) / f"{digest.hexdigest()[:16]}-costs.json"
    if not path.exists():
        with _inputs(calibration, importance) as (chunks, weights):
            job = GgufSurveyJob(
                source=replace(source, folder=source.folder.resolve()),
                types=dict(types),
                importance=weights,
                chunks=chunks,
                threads=threads,
                device=device,
            )
            outcome = worker.run(job, progress)
        with atomic_output(path, force=True) as temporary:
            temporary.write_text(json.dumps(outcome.numbers, indent=2))
    found: dict[str, dict[str, float]] = read_json(path)
    return found


def round_model(
    source: ModelSource,
    types: Mapping[str, str],
    imatrix: ImportanceMatrix | None,
    calibration: Calibration,
    *,
    device: Literal["cpu", "cuda"],
    threads: int,
    progress: Progress,
    present: Artifact | None = None,
) -> RoundedModel:
    """Return the tensors of a file of these `types`; progress counts the model's blocks and its head.

    present: a file to be refined instead of rounding anew.

    Raises MeasureError with the reason when the child cannot make them.
    """
    check_source(source)
    importance = _importance(imatrix, types)
    digest = _digest(dict(types), importance, calibration)
    if present is not None:
        digest.update(file_sha256(present.path).encode())
    folder = rounded_folder(source) / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if any(kind in ROUNDED_TYPES for kind in types.values()):
        with _inputs(calibration, importance) as (chunks, weights):
            job = RoundJob(
                # A copy without what was read so far: it goes to another process.
                source=replace(source, folder=source.folder.resolve()),
                types=dict(types),
                importance=weights,
                chunks=chunks,
                folder=folder.resolve(),
                threads=threads,
                device=device,
                present=None if present is None else present.path.resolve(),
            )
            worker.run(job, progress)
    stored = StoredTensors(folder)
    return RoundedModel(stored, stored.facts)


def _importance(imatrix: ImportanceMatrix | None, names: Iterable[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the importance of the inputs of those tensors that have one."""
    entries = {} if imatrix is None else imatrix.entries
    return {name: entries[name].weights() for name in names if name in entries}


def _digest(
    types: Mapping[str, Any], importance: Mapping[str, npt.NDArray[np.float32]], calibration: Calibration
) -> hashlib._Hash:
    digest = hashlib.sha256(json.dumps(sorted(types.items())).encode())
    for name in sorted(importance):
        digest.update(name.encode() + importance[name].tobytes())
    digest.update(calibration.sha256.encode())
    return digest


@contextmanager
def _inputs(
    calibration: Calibration, importance: Mapping[str, npt.NDArray[np.float32]]
) -> Iterator[tuple[Path, Path]]:
    """Yield two files for a child: the chunks and the importance."""
    with tempfile.TemporaryDirectory(prefix="ggtool-calibrate-") as scratch:
        chunks, weights = Path(scratch) / "chunks.npy", Path(scratch) / "importance.safetensors"
        np.save(chunks, calibration.chunks)
        save_file(dict(importance), weights)
        yield chunks, weights
